"""Stochastic rounding to half precision, reproducible to the bit: the torch side, and what the kernels must match.

A value between two neighbours lo < v < hi of the target dtype becomes hi with probability (v − lo)/(hi − lo), so that
the expectation of the result is v. The 32 random bits of an element depend on (seed, row, column) alone, never on how
a matrix is cut into tiles: two keys per row, then the finaliser of MurmurHash3 (A. Appleby) over the column, with the
first key before its rounds and the second between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic")
HALF = (torch.float16, torch.bfloat16)

_WORD = 0xFFFFFFFF
_LONG_WORD = 0xFFFFFFFFFFFFFFFF


def _signed(word: int) -> int:
    """Return a 32-bit word as the int32 of the same bits."""
    return word - (1 << 32) if word >> 31 else word


FIRST_FACTOR, SECOND_FACTOR = _signed(0x85EBCA6B), _signed(0xC2B2AE35)  # MurmurHash3's


def seed_keys(seed: int) -> tuple[int, int]:
    """Return a seed (0 … 2⁶³ − 1) as two int32 keys, by one step of SplitMix64: near seeds give far keys."""
    word = (seed + 0x9E3779B97F4A7C15) & _LONG_WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _LONG_WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _LONG_WORD
    word ^= word >> 31
    return _signed(word & _WORD), _signed(word >> 32)


def _shifted(word: Tensor, places: int) -> Tensor:
    """Return int32 words shifted right, zeros moving in."""
    return (word >> places).bitwise_and_((1 << (32 - places)) - 1)


def _mixed(word: Tensor, key: Tensor | int = 0) -> Tensor:
    """Return MurmurHash3's finaliser of int32 words, `key` entering between its rounds."""
    word = (word ^ _shifted(word, 16)).mul_(FIRST_FACTOR)
    word = word.bitwise_xor_(_shifted(word, 13)).bitwise_xor_(key).mul_(SECOND_FACTOR)
    return word.bitwise_xor_(_shifted(word, 16))


def element_bits(seed: int, first_row: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the 32 random bits of the elements of rows first_row …: (rows, columns) int32."""
    first, second = seed_keys(seed)
    row = torch.arange(first_row, first_row + rows, device=device).to(torch.int32)[:, None]
    column = torch.arange(columns, device=device).to(torch.int32)[None, :]
    return _mixed(column ^ _mixed(row ^ first), _mixed(row ^ second))


def round_stochastically(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 values in `dtype` (float16 or bfloat16), rounded up or down by their random bits (int32).

    NaN, infinities and what lies beyond the largest finite value become what rounding to nearest makes of them.
    bfloat16 is exact in expectation; float16 too, but for subnormals, where the probability is a multiple of 2⁻²⁴.
    """
    words = values.view(torch.int32)
    if dtype is torch.bfloat16:
        rounded = (words + _shifted(bits, 16)).bitwise_and_(-1 << 16).view(torch.float32)
    else:
        rounded = (words + _shifted(bits, 19)).bitwise_and_(-1 << 13)
        # Below 2⁻¹⁴ float16's spacing stays 2⁻²⁴, whatever the exponent.
        steps = values.abs() * 2.0**24
        whole = steps.floor()
        up = _shifted(bits, 8).to(torch.float32) * 2.0**-24 < steps - whole
        small = ((whole + up) * 2.0**-24).view(torch.int32) | (words & _signed(1 << 31))
        rounded = torch.where(steps < 2.0**10, small, rounded).view(torch.float32)
    ordinary = values.abs() <= torch.finfo(dtype).max
    return torch.where(ordinary, rounded, values).to(dtype)
