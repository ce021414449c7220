"""Stochastic rounding to half precision, reproducible to the bit: the torch side, and what the kernels must match.

A value between two neighbours lo < v < hi of the target dtype becomes hi with probability (v − lo)/(hi − lo), so that
the expectation of the result is v. The random bits are the upper ones of the element's word (`hashing`), so they depend
on (seed, row, column) alone, never on how a matrix is cut into tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hashing import column_steps, element_words, row_keys, shifted_right, signed

ROUNDINGS = ("nearest", "stochastic")
HALF = (torch.float16, torch.bfloat16)


def element_bits(seed: int, first_row: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the random words of the elements of rows first_row …: (rows, columns) int32."""
    numbers = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)
    seeds = torch.full((), seed, dtype=torch.int64, device=device)  # filled there: no copy from the host
    return element_words(*row_keys(seeds, numbers), column_steps(columns, device))


def round_stochastically(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 values in `dtype` (float16 or bfloat16), rounded up or down by their random bits (int32).

    NaN, infinities and what lies beyond the largest finite value become what rounding to nearest makes of them.
    bfloat16 is exact in expectation; float16 too, but for subnormals, where the probability is a multiple of 2⁻²⁴.
    """
    words = values.view(torch.int32)
    if dtype is torch.bfloat16:
        rounded = (words + shifted_right(bits, 16)).bitwise_and_(-1 << 16).view(torch.float32)
    else:
        rounded = (words + shifted_right(bits, 19)).bitwise_and_(-1 << 13)
        # Below 2⁻¹⁴ float16's spacing stays 2⁻²⁴, whatever the exponent.
        steps = values.abs() * 2.0**24
        whole = steps.floor()
        up = shifted_right(bits, 8).to(torch.float32) * 2.0**-24 < steps - whole
        small = ((whole + up) * 2.0**-24).view(torch.int32) | (words & signed(1 << 31))
        rounded = torch.where(steps < 2.0**10, small, rounded).view(torch.float32)
    ordinary = values.abs() <= torch.finfo(dtype).max
    return torch.where(ordinary, rounded, values).to(dtype)
