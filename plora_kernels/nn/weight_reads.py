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
from typing import Any, NamedTuple

import torch
from torch import nn

from plora_kernels.nn.conditions import may_hold
from plora_kernels.nn.source_reads import Read, names_in, reads_a_local, reads_in

# Reads that never happen, by class and child: DeBERTa reads in_proj's weight for query states of their own, which its
# models do not pass (their z_steps is 0).
_NEVER = {("DisentangledSelfAttention", "in_proj")}


def find_weight_reads(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return those of `names` whose weight is read past the layer, with a sentence that says where."""
    modules = dict(model.named_modules())
    inside: dict[str, list[str]] = {}  # of each module around some of the names, these
    for name in names:
        for end in _ends_of_parents(name):
            inside.setdefault(name[:end], []).append(name)
    methods = {ancestor: _methods_of(modules[ancestor]) for ancestor in inside}
    reached = _reached_from_forward({method for defined in methods.values() for method in defined})
    found: dict[str, str] = {}
    for ancestor, defined in methods.items():
        start = len(ancestor) + 1 if ancestor else 0
        for read, where in _reads_of(modules[ancestor], [method for method in defined if method.name in reached]):
            for name in inside[ancestor]:
                if read.matches(name[start:]):
                    found.setdefault(name, f"{where} reads the weight past the layer")
        if isinstance(modules[ancestor], nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            for name in (name for name in inside[ancestor] if "." not in name[start:]):
                found[name] = (
                    "nn.TransformerEncoderLayer's fast path reads the weight past the layer in evaluation; call "
                    "torch.backends.mha.set_fastpath_enabled(False) first"
                )
    return found


def _ends_of_parents(name: str) -> Iterator[int]:
    """Yield where the names of the modules around the module of this name end in it, the model's own, 0, included."""
    yield 0
    yield from (position for position, letter in enumerate(name) if letter == ".")


class _Method(NamedTuple):
    """A function that may run for a module: the name of the class that defines it, and its own name there."""

    owner: str
    name: str
    function: FunctionType


def _reads_of(module: nn.Module, methods: list[_Method]) -> Iterator[tuple[Read, str]]:
    """Yield the reads of children's weights in these methods of a module, with the method."""
    for owner, name, function in methods:
        for read in reads_in(function):
            handed = read.through is None or any(m.name == read.through and reads_a_local(m.function) for m in methods)
            never = any(owner == kind and read.matches(child) for kind, child in _NEVER)
            if handed and not never and all(may_hold(condition, module) for condition in read.conditions):
                yield read, f"{owner}.{name}"


def _reached_from_forward(methods: Iterable[_Method]) -> set[str]:
    """Return the names of methods that forward passes may call: forward, and all that such methods mention."""
    mentioned: dict[str, set[str]] = {}
    for _, name, function in methods:
        mentioned.setdefault(name, set()).update(names_in(function.__code__))
    reached, new = set[str](), {"forward"}
    while new:
        reached |= new
        new = {name for method in new for name in mentioned.get(method, ()) if name in mentioned} - reached
    return reached


def _methods_of(module: nn.Module) -> list[_Method]:
    """Return the methods that run for the module, those put on the instance included."""
    kind: Any = type(module)  # mypy does not take a class of modules for hashable
    own = [_Method(kind.__name__, name, f) for name, value in vars(module).items() for f in _unwrapped(value)]
    replaced = {method.name for method in own}
    return own + [method for method in _methods_of_class(kind) if method.name not in replaced]


@functools.lru_cache(maxsize=1024)
def _methods_of_class(kind: type) -> tuple[_Method, ...]:
    """Return the methods that run for modules of a class, inherited ones included.

    A method that a subclass overrides counts only if the subclass calls super().
    """
    methods: list[_Method] = []
    overridden: set[str] = set()
    for ancestor in kind.__mro__:
        # The transformer layers of torch read weights for their fast path alone, which `find_weight_reads` looks at.
        if ancestor in (nn.Module, object) or ancestor.__module__ == "torch.nn.modules.transformer":
            continue
        for name, value in vars(ancestor).items():
            functions = [] if name in overridden else list(_unwrapped(value))
            methods += [_Method(ancestor.__name__, name, function) for function in functions]
            if functions and not any("super" in names_in(function.__code__) for function in functions):
                overridden.add(name)
    return tuple(methods)


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
