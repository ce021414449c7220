"""The memory that a model's tensors use, to tell which of them are tied."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn


def storage_of(tensor: Tensor) -> int:
    """Return a number that tensors in the same memory share; sparse and some quantised ones have one of their own.

    >>> from torch import zeros
    >>> whole = zeros(4)
    >>> storage_of(whole) == storage_of(whole[:2]), storage_of(whole) == storage_of(zeros(4))
    (True, False)
    """
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):
        return id(tensor)


def storage_uses(model: nn.Module) -> Counter[int]:
    """Return under how many names of parameters and buffers the model uses each of its tensors' storages."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return Counter(storage_of(tensor) for _, tensor in tensors)
