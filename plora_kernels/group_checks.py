"""What the grouped form checks of its arguments: offsets, and a selection, a scale and a seed for each group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_number, check_probability
from .errors import ConfigError, DeviceError, DTypeError, SelectionError, ShapeError
from .selection import INDEX_MULTIPLE, Selection, check_rank, host_indices, index_from_mask

GroupSelections = Sequence[Selection | None] | Tensor


def group_offsets(groups: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Return offsets (C+1,) as a tensor, on the host or on `device`; their values are looked at by `host_bounds`."""
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
    """Raise ShapeError or RankError unless weight (N, K), lora_A (C, R, K), lora_B (C, N, R) fit C groups."""
    if weight.dim() != 2:
        raise ShapeError(f"weight is {tuple(weight.shape)}; a matrix (N, K) is needed")
    n, k = weight.shape
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
    """Return a selection for each group as index buffers (C, W) int32 on `device`; None for every module of all.

    A row names a group's modules and then −1. W is a multiple of 16: of the longest selection where they are host
    values, which are validated, and of R for a mask on a device or inside torch.compile, which is never read.
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
    index = torch.tensor([[*indices, *[-1] * (width - len(indices))] for indices in chosen], dtype=torch.int32)
    return _on_device(index.view(groups, width), device)


def group_scales(
    scale: float | Sequence[float] | Tensor, groups: int, device: torch.device
) -> tuple[float, Tensor | None]:
    """Return one number for all groups and None, or 1 and a scale for each group, (C,) on `device`."""
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
    return 1.0, _on_device(torch.tensor(numbers, dtype=torch.float64), device)


def group_seeds(p: object, seeds: Sequence[int] | Tensor | None, groups: int, device: torch.device) -> Tensor | None:
    """Return dropout's seeds (C,) int64 on `device`, None where p is 0; raise ConfigError for what cannot be used."""
    if check_probability("dropout_p", p) == 0:
        return None
    if isinstance(seeds, Tensor):
        if seeds.dtype is not torch.int64 or tuple(seeds.shape) != (groups,):
            raise ConfigError(f"dropout_seed is {tuple(seeds.shape)} {seeds.dtype}; int64 ({groups},) is needed")
        if seeds.device != device:
            raise DeviceError(f"dropout_seed is on {seeds.device}, x on {device}; put it there or pass integers")
        return seeds
    known = isinstance(seeds, Sequence) and len(seeds) == groups
    if not known or not all(type(seed) is int and -(2**63) <= seed < 2**63 for seed in seeds or ()):
        raise ConfigError(f"dropout_p is {p} and dropout_seed {seeds!r}; {groups} integers of 64 bits are needed")
    return _on_device(torch.tensor(seeds, dtype=torch.int64), device)


def check_dropout_rows(numbers: Tensor | None, rows: int, device: torch.device) -> None:
    """Raise unless `numbers`, the rows' numbers in their group's mask, is None or (M,) int64 on `device`."""
    if numbers is None:
        return
    if numbers.dtype is not torch.int64 or tuple(numbers.shape) != (rows,):
        raise ConfigError(f"dropout_rows is {tuple(numbers.shape)} {numbers.dtype}; int64 ({rows},) is needed")
    if numbers.device != device:
        raise DeviceError(f"dropout_rows is on {numbers.device}, x on {device}; put it there")


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on `device`; a CUDA device is not waited for, the copy leaves pinned memory."""
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
