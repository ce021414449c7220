"""What every public function checks of its arguments before an operator sees them."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .errors import ConfigError, DeviceError, DTypeError, SelectionError, ShapeError
from .selection import (
    Selection,
    check_mask,
    check_rank,
    complement,
    host_indices,
    index_buffer,
    index_from_mask,
    mask_from_indices,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNSELECTED = ("folded", "frozen")


def check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise ShapeError or RankError unless weight (N, K), lora_A (R, K), lora_B (N, R) fit together."""
    if weight.dim() != 2:
        raise ShapeError(f"weight is {tuple(weight.shape)}; a matrix (N, K) is needed")
    n, k = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != k:
        raise ShapeError(f"lora_A is {tuple(lora_A.shape)}; weight (N={n}, K={k}) needs (R, {k})")
    rank = check_rank(int(lora_A.shape[0]))
    if tuple(lora_B.shape) != (n, rank):
        raise ShapeError(
            f"lora_B is {tuple(lora_B.shape)}; weight (N={n}, K={k}) and lora_A of rank {rank} need ({n}, {rank})"
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


def index_for(selected: Selection | None, rank: int, device: torch.device, *, invert: bool = False) -> Tensor | None:
    """Return a selection (or its complement) as an index buffer on `device`; None for every module.

    Host sequences and host tensors are validated on the host. A tensor on the operator's own device that is not the
    host, and any tensor inside torch.compile, is turned into the buffer there, at width R: it is never read.
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
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; a finite number is needed")
    return float(value)


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
    """Return dropout's seed as one int64 on `device`, None where p is 0; raise ConfigError for what cannot be used."""
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
    """Return `unselected` if it names a form; raise ConfigError otherwise."""
    if unselected not in UNSELECTED:
        raise ConfigError(f"unselected is {unselected!r}; it may be 'folded' or 'frozen'")
    return unselected
