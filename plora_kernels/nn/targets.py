"""Which modules of a model a configuration targets: by name as in PEFT, less those that no adapter can serve."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from plora_kernels.errors import PLoRAWarning, TargetError
from plora_kernels.nn.config import PLoRAConfig, is_all_linear, pattern_matches
from plora_kernels.nn.quantized.known import check_quantized, kind_of
from plora_kernels.nn.replaceable import check_replaceable, class_name, unsupported_dtype
from plora_kernels.nn.saved_modules import modules_saved_whole
from plora_kernels.nn.weight_reads import find_weight_reads


def find_targets(model: nn.Module, config: PLoRAConfig) -> list[str]:
    """Return the names of the modules that `config` targets, in model order; each can be replaced.

    Modules that are saved whole, and all modules in them, are not targeted. What "all-linear" means in PEFT but cannot
    be adapted here is named in one warning, and so is a target that has no adapter only because of the task's head.

    Raises:
        TargetError: an entry matches no module, a target cannot be replaced, or none is left.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    excluded = {name for name in modules if matches(config.exclude_modules or (), name)}
    if config.exclude_modules and not excluded:
        _warn(f"exclude_modules {config.exclude_modules!r} matches no module; {nearest('', modules)}")
    saved = modules_saved_whole(model, config.modules_to_save, config.task_type)
    kept = {name: module for name, module in modules.items() if not is_within(saved, name) and name not in excluded}
    if is_all_linear(config.target_modules):
        names = _all_linear(model, kept)
    else:
        names = _named(config, modules, kept, [name for name in saved if name not in excluded])
        reads = find_weight_reads(model, names)
        for name in names:
            if name in reads:
                raise TargetError(f"target module {name!r} cannot be adapted: {reads[name]}; exclude it")
    for name in names:
        check = check_replaceable if kind_of(modules[name]) is None else check_quantized
        check(modules[name], f"target module {name!r} is")
    aliases = _other_names(model, names)
    if aliases:
        shown = ", ".join(f"{name} is also {other}" for other, name in list(aliases.items())[:3])
        _warn(f"{len(aliases)} shared modules have an adapter under their first name only, as in PEFT: {shown}")
    for what in ("rank_pattern", "alpha_pattern"):
        unused = [key for key in getattr(config, what) if not any(pattern_matches(key, name) for name in names)]
        if unused:
            _warn(f"{what} has keys that match no targeted module: {', '.join(map(repr, unused))}")
    return names


def _named(
    config: PLoRAConfig, modules: Mapping[str, nn.Module], kept: Mapping[str, nn.Module], saved: Sequence[str]
) -> list[str]:
    """Return the targets that a list of names or an expression matches.

    An entry that matches nothing but modules of a head that the task type saves whole is named in a warning: PEFT says
    nothing. Any other entry without a target is an error.
    """
    targets = config.target_modules if isinstance(config.target_modules, str) else frozenset(config.target_modules)
    listed = {name for name in saved if name.endswith(tuple(config.modules_to_save))}
    heads = [name for name in saved if name not in listed]
    names = [name for name in kept if matches(targets, name)]
    without = [name for name in modules if is_within(heads, name) and matches(targets, name)]
    if isinstance(targets, str):
        unmatched = [] if names or without else [targets]
    else:
        served = {end for name in (*names, *without) for end in _ends(name)}
        unmatched = [entry for entry in config.target_modules if entry not in served]
    for entry in unmatched:
        if any(matches(targets if isinstance(targets, str) else [entry], name) for name in modules):
            raise TargetError(
                f"target module {entry!r} leaves none: modules_to_save or exclude_modules names all of it"
            )
        if isinstance(targets, str):
            raise TargetError(f"target_modules {entry!r} matches no module; {nearest('', kept)}")
        raise TargetError(f"target module {entry!r} is not in the model; {nearest(entry, kept)}")
    if not names:
        raise TargetError(
            f"target_modules {targets!r} matches only modules that task_type {config.task_type!r} trains in full and "
            f"saves whole; {nearest('', kept)}"
        )
    if without:
        _warn(
            f"no adapter for {shortened(without)}: task_type {config.task_type!r} trains {', '.join(saved)} in full "
            "and saves it whole, as PEFT does",
            1,
        )
    return names


def _all_linear(model: nn.Module, kept: Mapping[str, nn.Module]) -> list[str]:
    """Return every linear but the output layer, plain or quantised; name others PEFT would adapt in one warning."""
    head = _output_layer(model)
    candidates = {name: module for name, module in kept.items() if module is not head}
    quantized = {name for name, module in candidates.items() if kind_of(module) is not None}
    linears = quantized | {name for name, module in candidates.items() if type(module) is nn.Linear}
    reads = find_weight_reads(model, [name for name in candidates if name in linears])
    names: list[str] = []
    left_out: dict[str, list[str]] = {}
    for name, module in candidates.items():
        if name not in quantized and unsupported_dtype(module) is not None:
            check_replaceable(module, f"target_modules is 'all-linear' and {name!r} is")
        if name in reads:
            left_out.setdefault(reads[name], []).append(name)
        elif name in linears:
            names.append(name)
        elif _is_other_linear(module):
            left_out.setdefault(f"{class_name(module)} instead of a plain nn.Linear", []).append(name)
        elif _holds_weights(module):
            left_out.setdefault(f"{type(module).__name__} holds the weights itself", []).append(name)
    text = "; ".join(f"{shortened(group)} ({why})" for why, group in left_out.items())
    if not names:
        rest = f" that can have an adapter; left out: {text}" if text else " and what is excluded or saved whole"
        raise TargetError(
            f"target_modules is 'all-linear', but the model has no nn.Linear besides its output layer{rest}"
        )
    if text:
        _warn(f"target_modules is 'all-linear', but these modules get no adapter: {text}", 1)
    return names


def _is_other_linear(module: nn.Module) -> bool:
    """Say whether this is a linear layer for PEFT, but no plain nn.Linear: a subclass, or transformers' Conv1D."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return isinstance(module, nn.Linear) or (conv1d is not None and isinstance(module, conv1d))


def _holds_weights(module: nn.Module) -> bool:
    """Say whether a module that is no layer of torch holds matrices itself: stacked ones, or a router's or experts'.

    PEFT's "all-linear" adapts those of a mixture of experts as parameters.
    """
    if any(kind.__module__.startswith("torch.nn.") and kind is not nn.Module for kind in type(module).__mro__):
        return False
    name = type(module).__name__.lower()
    least = 2 if "expert" in name or "router" in name else 3
    shapes = [p.shape for p in module.parameters(recurse=False)]  # of integers if they are quantised
    return any(least <= len(shape) <= 3 and min(shape) > 1 for shape in shapes)


def _other_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return the other names of targets that the model holds twice, with the target; they keep the plain module."""
    first = {model.get_submodule(name): name for name in names}
    others: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in first and name != first[module]:
            parents = [model.get_submodule(n.rpartition(".")[0]) for n in (name, first[module])]
            same_child = name.rpartition(".")[2] == first[module].rpartition(".")[2]
            if parents[0] is not parents[1] or not same_child:  # else the block around it is shared, and changes once
                others[name] = first[module]
    return others


def _output_layer(model: nn.Module) -> nn.Module | None:
    """Return the module that gives a language model's logits, which "all-linear" leaves out as PEFT does."""
    embeddings = getattr(model, "get_output_embeddings", None)
    return embeddings() if callable(embeddings) else None


def matches(pattern: Collection[str], name: str) -> bool:
    """Match a module name as PEFT does: an expression against all of it, list entries as whole names or suffixes."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(end in pattern for end in _ends(name))


def _ends(name: str) -> Iterator[str]:
    """Yield a name, and what follows each dot in it."""
    yield name
    yield from (name[position + 1 :] for position, letter in enumerate(name) if letter == ".")


def is_within(modules: Iterable[str], name: str) -> bool:
    """Say whether a module is one of `modules` or lies inside one; all names are whole."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def nearest(wanted: str, names: Iterable[str]) -> str:
    """Return a phrase with the module names most like `wanted` (their last parts, each once)."""
    known = list(names)
    if not known:
        return "the model has no modules to choose from"
    tails = list(dict.fromkeys(tail for name in known if not (tail := name.rsplit(".", 1)[-1]).isdigit())) or known
    near = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], tails, n=3, cutoff=0.4) or tails[:8]
    return f"the nearest names that exist are {', '.join(map(repr, near))}"


def shortened(names: Sequence[str], most: int = 6) -> str:
    """Return names on one line: those that differ in their numbers alone as one, with *, and no more than a few.

    >>> shortened(["layers.0.q_proj", "layers.1.q_proj", "head"])
    'layers.*.q_proj (2), head'
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    shown = [f"{form} ({len(group)})" if len(group) > 1 else group[0] for form, group in groups.items()]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _warn(message: str, depth: int = 0) -> None:
    """Warn at the line that called `inject`, `depth` functions further up than from `find_targets`."""
    warnings.warn(message, PLoRAWarning, stacklevel=4 + depth)
