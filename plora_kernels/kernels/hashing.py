"""An element's random word inside a kernel: bit for bit what `plora_kernels.hashing` makes in torch."""

from __future__ import annotations

import triton
import triton.language as tl

from ..hashing import FIRST, GOLDEN, SECOND

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
    """Return the words of a tile's elements, (BLOCK_M, BLOCK_N) uint32, under a seed of two 32-bit halves.

    rows (BLOCK_M,) and columns (BLOCK_N,) are integers of any width, whose low 32 bits count.
    """
    row, column = rows.to(tl.uint32), columns.to(tl.uint32)
    zero = tl.zeros_like(row)  # (BLOCK_M,) a block: the interpreter warns of scalars that wrap around
    low, high = zero + seed_low.to(tl.uint32), zero + seed_high.to(tl.uint32)
    start = _mixed(row ^ _mixed(low))  # (BLOCK_M,)
    key = _mixed(start + _mixed(high ^ tl.full((), _GOLDEN, tl.uint32)))  # (BLOCK_M,)
    word = start[:, None] + (column * tl.full((), _GOLDEN, tl.uint32))[None, :]  # (BLOCK_M, BLOCK_N)
    word = (word ^ (word >> 16)) * tl.full((), _FIRST, tl.uint32)
    return (word ^ (word >> 15) ^ key[:, None]) * tl.full((), _SECOND, tl.uint32)
