"""Bytes that cross the network: payload, indices and head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fed.types import ClientStart, ClientUpdate, Factors

# A module index is sent as int16: R is at most 256.
INDEX_BYTES = 2


def download_bytes(start: ClientStart, head: Mapping[str, Tensor]) -> int:
    """Return the bytes one client receives: every module of its start and the trained head.

    Σ_matrices R (K + N) · itemsize + Σ_head numel · itemsize. The frozen base is there already and counts
    nothing; the selection is drawn from the shared seed and is not sent.
    """
    return factor_bytes(start.factors) + tensor_bytes(head.values())


def upload_bytes(start: ClientStart, update: ClientUpdate) -> int:
    """Return the bytes one client sends: its r_i modules, their indices and its trained head.

    Σ_matrices r_i ((K + N) · itemsize + 2) + Σ_head numel · itemsize. A client that trained every module of
    a matrix sends no indices for it: they go without saying.
    """
    indices = 0
    for matrix, chosen in update.selected.items():
        if len(chosen) < start.factors[matrix][0].shape[0]:
            indices += INDEX_BYTES * len(chosen)
    return factor_bytes(update.factors) + indices + tensor_bytes(update.head.values())


def factor_bytes(factors: Mapping[str, Factors]) -> int:
    """Return the bytes of every A and B at their own dtype's size."""
    return sum(tensor_bytes(pair) for pair in factors.values())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return Σ numel · itemsize."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
