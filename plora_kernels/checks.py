"""Checks of the public functions' arguments before an operator runs, for single calls and for groups of rows."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from plora_kernels.counter_rng import HALF
from plora_kernels.errors import ConfigError, DeviceError, DTypeError, RankError, SelectionError, ShapeError
from plora_kernels.selection import (
    INDEX_MULTIPLE,
    MAX_RANK,
    Selection,
    check_mask,
    check_rank,
    complement,
    host_indices,
    index_buffer,
    index_from_mask,
    mask_from_indices,
    to_device,
)

GroupSelections = Sequence[Selection | None] | Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNSELECTED = ("folded", "frozen")


def check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise ShapeError or RankError unless weight (N, K), lora_A (R, K), lora_B (N, R) fit together.

    Raises DTypeError if the weight is quantised.
    """
    _check_dense(weight)
    if weight.dim() != 2:
        raise ShapeError(f"weight is {tuple(weight.shape)}; a matrix (N, K) is needed")
    n, k = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != k:
        raise ShapeError(f"lora_A is {tuple(lora_A.shape)}; weight (N={n}, K={k}) needs (R, {k})")
    rank = lora_A.shape[0]
    if not 1 <= rank <= MAX_RANK:  # not by `check_rank`, for which torch.compile would make the number a constant
        raise RankError(f"rank is {rank!r}; an integer from 1 to {MAX_RANK} is needed")
    if tuple(lora_B.shape) != (n, rank):
        raise ShapeError(
            f"lora_B is {tuple(lora_B.shape)}; weight (N={n}, K={k}) and lora_A of rank {rank} need ({n}, {rank})"
        )


def _check_dense(weight: Tensor) -> None:
    """Raise DTypeError for a weight of bytes: it is quantised, and its shape may be that of its packing."""
    if weight.dtype.itemsize == 1:
        raise DTypeError(
            f"weight is {weight.dtype}; float16, bfloat16, float32 or float64 is needed: a quantised weight takes "
            "modules in the frozen form of `inject` alone"
        )


def check_alike(first: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise DTypeError or DeviceError unless every tensor has the dtype and device of the one named `first`."""
    leader = tensors[first]
    assert leader is not None
    if leader.dtype not in DTYPES:
        raise DTypeError(f"{first} is {leader.dtype}; float16, bfloat16, float32 or float64 is needed")
    device, dtype = leader.device, leader.dtype
    for name, tensor in tensors.items():
        if tensor is None or (tensor.dtype is dtype and tensor.device == device):
            continue
        if tensor.device != leader.device:
            raise DeviceError(f"{name} is on {tensor.device}, {first} on {leader.device}; put them on one device")
        if tensor.dtype != leader.dtype:
            raise DTypeError(f"{name} is {tensor.dtype}, {first} is {leader.dtype}; cast one of them")


def may_adapt(factors: torch.dtype, dtype: torch.dtype) -> bool:
    """Say whether factors of a dtype may stand beside x and W of `dtype`: the same, or float32 beside half precision.

    >>> may_adapt(torch.float32, torch.bfloat16), may_adapt(torch.bfloat16, torch.float32)
    (True, False)
    """
    return factors is dtype or (factors is torch.float32 and dtype in HALF)


def check_operands(first: str, tensors: dict[str, Tensor | None], lora_A: Tensor, lora_B: Tensor) -> None:
    """Do what `check_alike` does, for factors too: A and B share one dtype, perhaps float32 beside half precision.

    Raises:
        DTypeError: A and B differ, or their dtype is not one that `may_adapt`. DeviceError: they are elsewhere.
    """
    check_alike(first, tensors)
    leader = tensors[first]
    assert leader is not None
    kind, device = lora_A.dtype, leader.device
    if kind is lora_B.dtype and may_adapt(kind, leader.dtype) and lora_A.device == device and lora_B.device == device:
        return
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor.device != device:
            raise DeviceError(f"{name} is on {factor.device}, {first} on {device}; put them on one device")
        if not may_adapt(factor.dtype, leader.dtype):
            also = " or use float32 factors" if leader.dtype in HALF else ""
            raise DTypeError(f"{name} is {factor.dtype}, {first} is {leader.dtype}; cast one of them{also}")
    raise DTypeError(f"lora_A is {lora_A.dtype}, lora_B is {lora_B.dtype}; cast one of them")


def index_for(selected: Selection | None, rank: int, device: torch.device, *, invert: bool = False) -> Tensor | None:
    """Return a selection (or its complement) as an index buffer on `device`; None if every module is selected.

    Host sequences and host tensors are validated on the host. A tensor on another device, and any tensor inside
    torch.compile, is never read by the host: the buffer of width R is computed from it on the device.
    """
    if selected is None:
        return None
    if isinstance(selected, Tensor) and (selected.device.type != "cpu" or torch.compiler.is_compiling()):
        if selected.device != device:
            if selected.device.type != "cpu":
                raise DeviceError(f"selected is on {selected.device}, the tensors on {device}; use that or the host")
            selected = selected.to(device, non_blocking=True)
        if selected.dtype is torch.bool:
            check_mask(selected, rank)
            mask = selected
        elif selected.is_floating_point() or selected.is_complex():
            raise SelectionError(f"selected is {selected.dtype}; integers are indices, a bool tensor is a mask")
        else:
            mask = mask_from_indices(selected, rank)
        return index_from_mask(~mask if invert else mask)
    indices = host_indices(selected, rank)
    return index_buffer(complement(indices, rank) if invert else indices, device)


def check_number(name: str, value: object) -> float:
    """Return a plain finite number as a float; raise ConfigError for anything else, a tensor included."""
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer above the largest float
        raise ConfigError(f"{name} is above {sys.float_info.max:.3g}; a finite number is needed") from None
    raise ConfigError(f"{name} is {value!r}; a finite number is needed")


def check_positive(name: str, value: object) -> float:
    """Return a positive finite number as a float; raise ConfigError for anything else."""
    number = check_number(name, value)
    if number <= 0:
        raise ConfigError(f"{name} is {value!r}; a positive number is needed")
    return number


def check_probability(name: str, value: object) -> float:
    """Return a number from 0 to below 1 as a float; raise ConfigError for anything else."""
    number = check_number(name, value)
    if not 0 <= number < 1:
        raise ConfigError(f"{name} is {value!r}; a probability from 0 to below 1 is needed")
    return number


def check_dropout(p: object, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """Return dropout's seed as one int64 on `device`, or None if p is 0; raise ConfigError for a bad p or seed."""
    if check_probability("dropout_p", p) == 0:
        return None
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise ConfigError(f"dropout_seed is {tuple(seed.shape)} {seed.dtype}; one int64 is needed")
        if seed.device != device:
            raise DeviceError(f"dropout_seed is on {seed.device}, x on {device}; put it there or pass an int")
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ConfigError(f"dropout_p is {p} and dropout_seed {seed!r}; an integer of 64 bits is needed")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def check_unselected(unselected: str) -> str:
    """Return `unselected` if it is "folded" or "frozen"; raise ConfigError otherwise."""
    if unselected not in UNSELECTED:
        raise ConfigError(f"unselected is {unselected!r}; it may be 'folded' or 'frozen'")
    return unselected


def group_offsets(groups: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Return offsets (C+1,) as a tensor, on the host or on `device`; their values are checked by `host_bounds`."""
    offsets = groups if isinstance(groups, Tensor) else torch.tensor(groups)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise DTypeError(f"groups is {offsets.dtype}; offsets are int32 or int64")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ShapeError(f"groups is {tuple(offsets.shape)}; the offsets of C ≥ 1 groups are (C+1,)")
    if offsets.device.type != "cpu" and offsets.device != device:
        raise DeviceError(f"groups is on {offsets.device}, x on {device}; put it there or on the host")
    return offsets


def host_bounds(offsets: Tensor, rows: int) -> list[int]:
    """Return offsets as a list; raise ShapeError unless they rise from 0 to the number of rows."""
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ShapeError(f"groups runs from {bounds[0]} to {bounds[-1]}; x has {rows} rows and needs 0 to {rows}")
    for group, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ShapeError(f"groups falls from {start} to {end} at group {group}; offsets may not decrease")
    return bounds


def check_group_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor, groups: int) -> None:
    """Raise ShapeError or RankError unless weight (N, K) or (C, N, K), A (C, R, K) and B (C, N, R) fit C groups."""
    _check_dense(weight)
    if weight.dim() not in (2, 3):
        raise ShapeError(
            f"weight is {tuple(weight.shape)}; a matrix (N, K) is needed, or with {groups} groups ({groups}, N, K)"
        )
    if weight.dim() == 3 and weight.shape[0] != groups:
        raise ShapeError(f"weight is {tuple(weight.shape)}; {groups} groups need ({groups}, N, K) or one matrix (N, K)")
    n, k = weight.shape[-2:]
    if lora_A.dim() != 3 or lora_A.shape[0] != groups or lora_A.shape[2] != k:
        raise ShapeError(
            f"lora_A is {tuple(lora_A.shape)}; {groups} groups and weight (N={n}, K={k}) need ({groups}, R, {k})"
        )
    rank = check_rank(int(lora_A.shape[1]))
    if tuple(lora_B.shape) != (groups, n, rank):
        raise ShapeError(
            f"lora_B is {tuple(lora_B.shape)}; {groups} groups, weight (N={n}, K={k}) and lora_A of rank {rank} need "
            f"({groups}, {n}, {rank})"
        )


def group_index(selected: GroupSelections | None, groups: int, rank: int, device: torch.device) -> Tensor | None:
    """Return the groups' selections as index buffers (C, W) int32 on `device`; None if all groups select all modules.

    Row g holds the module numbers of group g, then −1. Host values are validated, and W is the length of the longest
    selection, rounded up to a multiple of 16. A mask on a device or inside torch.compile is never read by the host, and
    W is R, rounded up to a multiple of 16.
    """
    if selected is None:
        return None
    if isinstance(selected, Tensor) and selected.dtype is torch.bool:
        if tuple(selected.shape) != (groups, rank):
            raise ShapeError(f"selected is {tuple(selected.shape)}; {groups} groups of rank {rank} need {groups, rank}")
        if selected.device.type != "cpu" and selected.device != device:
            raise DeviceError(f"selected is on {selected.device}, the tensors on {device}; use that or the host")
        if selected.device.type != "cpu" or torch.compiler.is_compiling():
            return index_from_mask(selected.to(device, non_blocking=True))
    elif isinstance(selected, Tensor) and selected.device.type != "cpu":
        raise SelectionError(f"selected is {selected.dtype} on {selected.device}; a device tensor must be a bool mask")
    chosen = [tuple(range(rank)) if one is None else host_indices(one, rank) for one in selected]
    if len(chosen) != groups:
        raise ShapeError(f"selected holds {len(chosen)} selections; {groups} groups need one each")
    if all(len(indices) == rank for indices in chosen):
        return None
    longest = max(map(len, chosen))
    width = longest + -longest % INDEX_MULTIPLE
    rows = [[*indices, *[-1] * (width - len(indices))] for indices in chosen]
    return to_device(rows, torch.int32, device).view(groups, width)


def group_scales(
    scale: float | Sequence[float] | Tensor, groups: int, device: torch.device
) -> tuple[float, Tensor | None]:
    """Return the groups' scales: `(scale, None)` if all are one host number, else `(1.0, scales (C,) on device)`."""
    if not isinstance(scale, Tensor | Sequence) or isinstance(scale, str):
        return check_number("scale", scale), None
    if len(scale) != groups if not isinstance(scale, Tensor) else tuple(scale.shape) != (groups,):
        shape = tuple(scale.shape) if isinstance(scale, Tensor) else (len(scale),)
        raise ShapeError(f"scale is {shape}; {groups} groups need one number or ({groups},)")
    if isinstance(scale, Tensor):
        if not scale.is_floating_point() or scale.requires_grad:
            raise ConfigError(
                f"scale is {scale.dtype}, requires_grad={scale.requires_grad}; constant floats are needed"
            )
        if scale.device.type != "cpu" or torch.compiler.is_compiling():
            return 1.0, scale.to(device, non_blocking=True)
    numbers = [check_number("scale", value) for value in (scale.tolist() if isinstance(scale, Tensor) else scale)]
    if len(set(numbers)) == 1:
        return numbers[0], None
    return 1.0, to_device(numbers, torch.float64, device)


def group_seeds(p: object, seeds: Sequence[int] | Tensor | None, groups: int, device: torch.device) -> Tensor | None:
    """Return dropout's seeds (C,) int64 on `device`, or None if p is 0; raise ConfigError for a bad p or seed."""
    if check_probability("dropout_p", p) == 0:
        return None
    if isinstance(seeds, Tensor):
        if seeds.dtype is not torch.int64 or tuple(seeds.shape) != (groups,):
            raise ConfigError(f"dropout_seed is {tuple(seeds.shape)} {seeds.dtype}; int64 ({groups},) is needed")
        if seeds.device != device:
            raise DeviceError(f"dropout_seed is on {seeds.device}, x on {device}; put it there or pass integers")
        return seeds
    numbers = seeds if isinstance(seeds, Sequence) else ()
    if len(numbers) != groups or not all(type(seed) is int and -(2**63) <= seed < 2**63 for seed in numbers):
        raise ConfigError(f"dropout_p is {p} and dropout_seed {seeds!r}; {groups} integers of 64 bits are needed")
    return to_device(numbers, torch.int64, device)


def check_dropout_rows(numbers: Tensor | None, rows: int, device: torch.device) -> None:
    """Raise unless `numbers`, the rows' numbers in their group's mask, is None or (M,) int64 on `device`."""
    if numbers is None:
        return
    if numbers.dtype is not torch.int64 or tuple(numbers.shape) != (rows,):
        raise ConfigError(f"dropout_rows is {tuple(numbers.shape)} {numbers.dtype}; int64 ({rows},) is needed")
    if numbers.device != device:
        raise DeviceError(f"dropout_rows is on {numbers.device}, x on {device}; put it there")
