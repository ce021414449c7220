"""Find the linears whose weight other modules read without calling them: an adapter of such a layer has no effect.

Examples are q_proj of WavLM, whose weight goes to a function for the whole attention, and out_proj of Mamba, whose
weight goes to a fused kernel. The source code of the modules around a linear tells (`source_reads`). A weight that is
reached in ways which the source does not show is not found here; that its layer is not called shows in the first
forward pass (`call_watch`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType

import torch
from torch import nn

from plora_kernels.nn.conditions import may_hold
from plora_kernels.nn.source_reads import names_in, reads_a_local, reads_in

# Reads that never happen, by class and child: DeBERTa reads in_proj's weight for query states of their own, which its
# models do not pass (their z_steps is 0).
_NEVER = {("DisentangledSelfAttention", "in_proj")}


def find_weight_reads(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return those of `names` whose weight is read past the layer, with a sentence that says where."""
    wanted = list(names)
    modules = dict(model.named_modules())
    ancestors = {name[:end] for name in wanted for end in _ends_of_parents(name)}
    functions = {name: list(_functions_of(modules[name])) for name in modules if name in ancestors}
    reached = _reached_from_forward(functions.values())
    found: dict[str, str] = {}
    for ancestor, defined in functions.items():
        module, prefix = modules[ancestor], f"{ancestor}." if ancestor else ""
        inside = {name.removeprefix(prefix): name for name in wanted if name.startswith(prefix)}
        readers = {method for _, method, function in defined if reads_a_local(function)}
        for owner, method, function in defined:
            for read in reads_in(function) if method in reached else ():
                runs = all(may_hold(condition, module) for condition in read.conditions)
                if not runs or (read.through is not None and read.through not in readers):
                    continue
                for relative, name in inside.items():
                    if read.matches(relative) and (owner, relative) not in _NEVER:
                        found.setdefault(name, f"{owner}.{method} reads the weight past the layer")
        if isinstance(module, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            for name in (inside[relative] for relative in inside if "." not in relative):
                found[name] = (
                    "nn.TransformerEncoderLayer's fast path reads the weight past the layer in evaluation; call "
                    "torch.backends.mha.set_fastpath_enabled(False) first"
                )
    return found


def _ends_of_parents(name: str) -> Iterator[int]:
    """Yield where the names of the modules around the module of this name end in it, the model's own, 0, included."""
    yield 0
    yield from (position for position, letter in enumerate(name) if letter == ".")


def _reached_from_forward(functions: Iterable[list[tuple[str, str, FunctionType]]]) -> set[str]:
    """Return the names of methods that forward passes may call: forward, and all that such methods mention."""
    mentioned: dict[str, set[str]] = {}
    for _, method, function in {entry for defined in functions for entry in defined}:
        mentioned.setdefault(method, set()).update(names_in(function.__code__))
    reached, new = set[str](), {"forward"}
    while new:
        reached |= new
        new = {name for method in new for name in mentioned.get(method, ()) if name in mentioned} - reached
    return reached


def _functions_of(module: nn.Module) -> Iterator[tuple[str, str, FunctionType]]:
    """Yield the functions that run for the module: its class that defines them, its name there, and the function.

    A function that a subclass overrides counts only if the subclass calls super().
    """
    overridden: set[str] = set()
    spaces = [(type(module).__name__, vars(module)), *((kind.__name__, vars(kind)) for kind in type(module).__mro__)]
    for owner, space in spaces:
        # The transformer layers of torch read weights for their fast path alone, which `find_weight_reads` looks at.
        if owner in ("Module", "object") or space.get("__module__") == "torch.nn.modules.transformer":
            continue
        for method, value in space.items():
            functions = [] if method in overridden else list(_unwrapped(value))
            yield from ((owner, method, function) for function in functions)
            if functions and not any("super" in names_in(function.__code__) for function in functions):
                overridden.add(method)


def _unwrapped(value: object) -> Iterator[FunctionType]:
    """Yield the functions behind a method, a property or a decorated function."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, staticmethod | classmethod | MethodType):
        value = value.__func__
    elif isinstance(value, functools.partial | functools.partialmethod | functools.cached_property):
        value = value.func
    if not isinstance(value, FunctionType):
        return
    function = inspect.unwrap(value)
    if not isinstance(function, FunctionType):
        return
    yield function
    for cell in function.__closure__ or ():  # a decorator that does not use functools.wraps
        try:
            inner = cell.cell_contents
        except ValueError:  # not filled
            continue
        if isinstance(inner, FunctionType) and inner is not function:
            yield inner
