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

# Digests of `code_of` and the versions they were read in. In each, the fused forward was compared with PEFT's.
KNOWN = {
    "90cd7371d00aa073": "0.17",
    "566edf4d0a1be110": "0.18 to 0.21",
}
_READ_BY_FORWARD = ("merged", "disable_adapters", "active_adapter", "active_adapters")


def why_unknown() -> str | None:
    """Return None if the installed PEFT's LoRA layer is a known one, else what is unknown, with the version."""
    digest = _digest(lora.Linear.forward)
    if digest in KNOWN:
        return None
    return f"the LoRA layer of PEFT {peft.__version__} looks otherwise than those known"


@functools.lru_cache(maxsize=8)  # a patched forward is another object
def _digest(forward: Callable[..., Any]) -> str | None:
    """Return a digest of all that PEFT's LoRA forward is made of, or None where the source is not at hand."""
    functions = [forward, lora.LoraLayer._check_forward_args, lora.LoraLayer._mixed_batch_forward]
    functions += [BaseTunerLayer._cast_input_dtype]
    functions += [vars(BaseTunerLayer)[name].fget for name in _READ_BY_FORWARD]
    try:
        code = [code_of(function) for function in functions]
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return None
    code.append(repr(getattr(lora, "VARIANT_KWARG_KEYS", None)))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def code_of(function: Callable[..., Any]) -> str:
    """Return a function's code without comments, docstrings, messages and layout, which say nothing of what it does.

    >>> code_of(why_unknown).split()[:4]
    ['def', 'why_unknown', '(', ')']
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
