"""Random words of matrix elements and stochastic rounding in kernels, bit for bit as in `plora_kernels.counter_rng`."""

from __future__ import annotations

import triton
import triton.language as tl

from plora_kernels.counter_rng import FIRST, GOLDEN, SECOND

_GOLDEN: tl.constexpr = tl.constexpr(GOLDEN)
_FIRST: tl.constexpr = tl.constexpr(FIRST)
_SECOND: tl.constexpr = tl.constexpr(SECOND)


@triton.jit
def _mixed(word):
    """Return uint32 words with every bit of the input spread over the output."""
    word = (word ^ (word >> 16)) * tl.full((), _FIRST, tl.uint32)
    word = (word ^ (word >> 15)) * tl.full((), _SECOND, tl.uint32)
    return word ^ (word >> 16)


@triton.jit
def element_words(seed_low, seed_high, rows, columns):
    """Return the words of a tile's elements, (BLOCK_M, BLOCK_N) uint32, for a seed in two 32-bit halves.

    rows (BLOCK_M,) and columns (BLOCK_N,) are integers of any width, of which the low 32 bits are used.
    """
    row, column = rows.to(tl.uint32), columns.to(tl.uint32)
    zero = tl.zeros_like(row)  # (BLOCK_M,): as scalars the halves would make the interpreter warn of overflow
    low, high = zero + seed_low.to(tl.uint32), zero + seed_high.to(tl.uint32)
    start = _mixed(row ^ _mixed(low))  # (BLOCK_M,)
    key = _mixed(start + _mixed(high ^ tl.full((), _GOLDEN, tl.uint32)))  # (BLOCK_M,)
    word = start[:, None] + (column * tl.full((), _GOLDEN, tl.uint32))[None, :]  # (BLOCK_M, BLOCK_N)
    word = (word ^ (word >> 16)) * tl.full((), _FIRST, tl.uint32)
    return (word ^ (word >> 15) ^ key[:, None]) * tl.full((), _SECOND, tl.uint32)


@triton.jit
def round_stochastically(values, bits, dtype: tl.constexpr):
    """Return fp32 values in `dtype` (fp16 or bf16), rounded up or down by their random words (`element_words`)."""
    words = values.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = ((words + (bits >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = (words + (bits >> 19)) & 0xFFFFE000
        # Below 2⁻¹⁴ float16 is subnormal: its spacing is 2⁻²⁴ for every exponent.
        steps = tl.abs(values) * 16777216.0
        whole = tl.floor(steps)
        up = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 < steps - whole
        small = (whole + up.to(tl.float32)) * 5.9604644775390625e-08
        small = small.to(tl.uint32, bitcast=True) | (words & 0x80000000)
        rounded = tl.where(steps < 1024.0, small, rounded).to(tl.float32, bitcast=True)
    largest: tl.constexpr = 3.3895313892515355e38 if dtype == tl.bfloat16 else 65504.0
    # Values beyond the largest finite one, infinities and NaN are rounded to nearest.
    return tl.where(tl.abs(values) <= largest, rounded, values).to(dtype)
