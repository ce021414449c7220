"""Selections of one-rank modules: the host form, and the index buffers that kernels read.

An index buffer is an int32 vector whose length is a multiple of 16. Its entries are distinct module numbers, or −1 for
no module. A kernel that is given one reads and writes only the modules it names.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from plora_kernels.errors import RankError, SelectionError, ShapeError

MAX_RANK = 256
INDEX_MULTIPLE = 16  # the narrowest tile of tl.dot

Selection = Sequence[int] | Tensor


def check_rank(rank: int) -> int:
    """Return `rank` if it is an integer in 1–256; raise RankError otherwise."""
    try:
        number = 0 if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        number = 0
    if not 1 <= number <= MAX_RANK:
        raise RankError(f"rank is {rank!r}; an integer from 1 to {MAX_RANK} is needed")
    return number


def host_indices(selected: Selection, rank: int) -> tuple[int, ...]:
    """Return the sorted module numbers of a host selection.

    Args:
        selected: a bool tensor (R,) is a mask, integers are indices, an empty sequence selects none.
        rank: R, the number of modules.

    Raises:
        SelectionError: an index is out of range or repeated, or the values are neither integers nor a bool tensor.
        ShapeError: a mask that is not (R,).
    """
    if isinstance(selected, Tensor) and selected.dtype is torch.bool:
        check_mask(selected, rank)
        return tuple(selected.nonzero().flatten().tolist())
    values = selected.tolist() if hasattr(selected, "tolist") else selected
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise SelectionError(f"selected is {selected!r}; a list of module indices or a bool mask is needed")
    values = [_module_number(value, rank) for value in values]
    if len(set(values)) < len(values):
        repeated = sorted({value for value in values if values.count(value) > 1})
        raise SelectionError(f"selected names module {repeated[0]} more than once; each index may stand once")
    return tuple(sorted(values))


def _module_number(value: object, rank: int) -> int:
    if isinstance(value, bool):
        raise SelectionError(f"selected holds the bool {value}; pass a mask as torch.tensor([...], dtype=torch.bool)")
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # NumPy's integers are integers too
    except TypeError:
        raise SelectionError(f"selected holds {value!r}; module indices are integers") from None
    if not 0 <= number < rank:
        raise SelectionError(f"selected holds module {number}; rank {rank} has modules 0 to {rank - 1}")
    return number


def complement(indices: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return the modules of 0 … R−1 that `indices` does not name."""
    chosen = set(indices)
    return tuple(j for j in range(rank) if j not in chosen)


def check_mask(mask: Tensor, rank: int) -> None:
    """Raise ShapeError unless `mask` is (R,)."""
    if tuple(mask.shape) != (rank,):
        raise ShapeError(f"the selection mask is {tuple(mask.shape)}; rank {rank} needs ({rank},)")


def index_buffer(indices: Sequence[int], device: torch.device) -> Tensor:
    """Return host indices as an index buffer on `device`, padded with −1 to a multiple of 16."""
    return to_device(padded(indices), torch.int32, device)


def padded(indices: Sequence[int]) -> list[int]:
    """Return indices followed by as many −1 as make their number a multiple of 16."""
    return [*indices, *[-1] * (-len(indices) % INDEX_MULTIPLE)]


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return host numbers as a tensor on `device`; to a CUDA device the copy is asynchronous, from pinned memory."""
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def index_from_mask(mask: Tensor) -> Tensor:
    """Return masks (…, R) as index buffers on their device, not read by the host: entry j is j if selected, else −1."""
    rank = mask.shape[-1]
    numbers = torch.arange(rank, dtype=torch.int32, device=mask.device)
    index = torch.where(mask, numbers, -1)
    # The kernels read a contiguous index. `pad` by zero entries would keep the mask's strides.
    return torch.nn.functional.pad(index, (0, -rank % INDEX_MULTIPLE), value=-1).contiguous()


def mask_from_indices(indices: Tensor, rank: int) -> Tensor:
    """Return integer indices as a mask (R,) on their device without reading them on the host.

    Indices out of range or repeated raise a RuntimeError when the device executes the check.
    """
    hits = indices[:, None] == torch.arange(rank, device=indices.device)  # (r, R)
    valid = hits.any(1).all() & (hits.sum(0) <= 1).all()
    torch._assert_async(valid, f"selected must hold distinct modules from 0 to {rank - 1}")
    return hits.any(0)
