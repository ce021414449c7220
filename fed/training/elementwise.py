"""Activations that the backward computes again, because they follow elementwise from others that are kept anyway.

A gated MLP's forward keeps g and u, act(g), and act(g)·u for the next layer's adapter. The last two are half of these
numbers, and cost the backward next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Functions of one tensor, whose backward keeps it, and products of two.
ACTIVATIONS = {functional.silu, functional.gelu}
PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__}
NOTED = 4  # the results that are known at a time: they are held, and an MLP keeps its own at once
DEEPEST = 2  # functions one after another that are computed again for one tensor: an activation and a product


class Kept(NamedTuple):
    """A tensor that is kept, at a version; None stands for one that does not count versions."""

    tensor: Tensor
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> Kept:
        """Keep a tensor as it is now."""
        return cls(tensor.detach(), _version(tensor))

    def compute(self) -> Tensor:
        """Return the tensor; raises RuntimeError, as autograd does without this file, if it was changed in place."""
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} that the backward needs was changed in place: it is at version "
                f"{self.tensor._version} instead of {self.version}"
            )
        return self.tensor


class Recipe(NamedTuple):
    """How to compute a tensor of a shape again: a function of tensors that are kept, or of what other recipes give."""

    function: Callable[..., Tensor]
    inputs: tuple[Kept | Recipe, ...]
    settings: dict[str, Any]
    shape: torch.Size
    depth: int

    def compute(self) -> Tensor:
        """Return the tensor, bit for bit; raises RuntimeError if an input was changed in place."""
        return self.function(*(one.compute() for one in self.inputs), **self.settings).view(self.shape)


class _Notes(TorchFunctionMode):
    """Notes how the latest activations and products were computed."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: list[tuple[Kept, Recipe]] = []  # results, which are held so that none takes their place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ACTIVATIONS:
            self._note(result, func, args, {name: one for name, one in (kwargs or {}).items() if name != "inplace"})
        elif func in PRODUCTS and not kwargs:
            self._note(result, torch.mul, args, {})
        return result

    def recipe_of(self, tensor: Tensor) -> Recipe | None:
        """Return how a tensor was computed, if it is one of the latest results, unchanged."""
        for (result, version), recipe in self._latest:
            if _is_same(tensor, result) and _version(tensor) == version:
                return recipe._replace(shape=tensor.shape)
        return None

    def forget(self) -> None:
        """Release what is held."""
        self._latest = []

    def _note(self, result: Any, function: Callable[..., Tensor], inputs: Any, settings: dict[str, Any]) -> None:
        """Note a result if all inputs are of its shape and kept by its own backward."""
        if not inputs or not all(isinstance(one, Tensor) and one.requires_grad for one in (result, *inputs)):
            return
        if any(one.shape != result.shape or one.dtype is not result.dtype or _is_same(one, result) for one in inputs):
            return  # it is another number of numbers, or was computed in place
        sources = [self.recipe_of(one) or Kept.of(one) for one in inputs]
        depth = 1 + max(one.depth if isinstance(one, Recipe) else 0 for one in sources)
        if depth > DEEPEST or not _is_plain(result):
            return
        recipe = Recipe(function, tuple(sources), settings, result.shape, depth)
        self._latest = [*self._latest[1 - NOTED :], (Kept.of(result), recipe)]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds real numbers in a storage as they are."""
    return tensor.layout is torch.strided and tensor.is_floating_point() and not tensor.is_neg()


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same numbers of the same storage, perhaps with rows counted otherwise."""
    if not (_is_plain(one) and _is_plain(other)):
        return False
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata or one.dtype is not other.dtype:
        return False
    if one.storage_offset() != other.storage_offset() or one.numel() != other.numel():
        return False
    is_dense = one.is_contiguous() and other.is_contiguous()
    return is_dense or (one.shape == other.shape and one.stride() == other.stride())


# Those who are to see every tensor that is kept: see `observing`.
_observers: list[Callable[[Tensor], None]] = []


@contextmanager
def observing(observer: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, `observer` sees every tensor that a forward keeps for its backward."""

    def keep(tensor: Tensor) -> Kept:
        observer(tensor)
        return Kept.of(tensor)

    _observers.append(observer)
    try:
        with saved_tensors_hooks(keep, Kept.compute):
            yield
    finally:
        _observers.remove(observer)


@contextmanager
def computing_again() -> Iterator[None]:
    """Within the context, a forward does not keep what follows elementwise from tensors that it keeps.

    They are results of SiLU and GELU, and products of two tensors that both need a gradient. Gradients are the same bit
    for bit.

    >>> x = torch.ones(3, requires_grad=True)
    >>> with computing_again():
    ...     y = (functional.silu(x) * x).square().sum()
    >>> y.backward()
    """
    notes = _Notes()

    def keep(tensor: Tensor) -> Kept | Recipe:
        if (recipe := notes.recipe_of(tensor)) is not None:
            return recipe
        for observer in _observers:
            observer(tensor)
        return Kept.of(tensor)

    def give(kept: Kept | Recipe) -> Tensor:
        return kept.compute()

    try:
        with saved_tensors_hooks(keep, give), notes:
            yield
    finally:
        notes.forget()  # the graph has references to the hooks, and they to these
