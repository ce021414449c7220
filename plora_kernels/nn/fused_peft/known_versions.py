"""Which versions of PEFT have the forward that the fused layers replace, told by its code and not by the number."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import token
import tokenize
from collections.abc import Callable
from typing import Any

import peft
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer

# Digests of the code that each fused class replaces, and the versions it was read in. The fused forwards were compared
# with PEFT's under 0.17.1, 0.18.1, 0.20.0 and 0.21.2, those of experts under the last two.
KNOWN: dict[type, dict[str | None, str]] = {
    lora.Linear: {"66a841f454c090d1": "0.17", "9df6a922ee3d28a4": "0.18 to 0.21.2"},
    lora.ParamWrapper: {"d73591d0108087d0": "0.19 and 0.20", "0a31c57119964b2b": "0.21.0 to 0.21.2"},
}
_READ_BY_FORWARD = ("merged", "disable_adapters", "active_adapter", "active_adapters")


def why_unknown(kind: Any) -> str | None:
    """Return None if a class of the installed PEFT's LoRA layers is a known one, else what is unknown.

    >>> why_unknown(lora.Linear) is None
    True
    """
    if _digest(kind) in KNOWN[kind]:
        return None
    return f"lora.{kind.__name__} of PEFT {peft.__version__} looks otherwise than those known"


def _digest(kind: Any) -> str | None:
    """Return a digest of all that a class's forward is made of, or None where the source is not at hand."""
    functions = [kind.forward, kind._check_forward_args]
    functions += [vars(BaseTunerLayer)[name].fget for name in _READ_BY_FORWARD]
    if kind is lora.Linear:
        functions += [lora.LoraLayer._mixed_batch_forward, BaseTunerLayer._cast_input_dtype]
    else:
        # How the factors of all experts are stored, and what is done with the weights that they make.
        functions += [kind.get_delta_weight, inspect.unwrap(kind._activate_lora)]
        proxies = (getattr(lora, name, None) for name in ("_LoraParameterProxy", "_LoraFactorsProxy"))
        functions += [proxy.forward for proxy in proxies if proxy is not None]
    try:
        code = [_known_code(function) for function in functions]
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return None
    code.append(repr(getattr(lora, "VARIANT_KWARG_KEYS", None)))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=64)  # a function that was patched is another object
def _known_code(function: Callable[..., Any]) -> str:
    return code_of(function)


def code_of(function: Callable[..., Any]) -> str:
    """Return a function's code without comments, docstrings, messages and layout, which say nothing of what it does.

    >>> code_of(why_unknown).split()[:4]
    ['def', 'why_unknown', '(', 'kind']
    """
    words, depth = list[str](), 0
    for word in tokenize.generate_tokens(io.StringIO(inspect.getsource(function)).readline):
        # From Python 3.12 on an f-string is several tokens, before that a single one: both are left out.
        name = token.tok_name[word.type]
        depth += name in ("FSTRING_START", "TSTRING_START")
        is_text = word.type == token.STRING and (word.string[0] in "fF" or word.string.lstrip("rR").startswith('"""'))
        if depth == 0 and not is_text:
            words += _BLOCKS.get(word.type, [word.string])
        depth -= name in ("FSTRING_END", "TSTRING_END")
    return " ".join(words)


# Blocks are kept, as braces; how far they are indented is not.
_BLOCKS: dict[int, list[str]] = {
    token.INDENT: ["{"],
    token.DEDENT: ["}"],
    token.NEWLINE: [],
    tokenize.NL: [],
    tokenize.COMMENT: [],
}
