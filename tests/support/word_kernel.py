"""A kernel that stores random words as they are."""

from __future__ import annotations

import triton
import triton.language as tl

from plora_kernels.kernels.counter_rng import element_words


@triton.jit
def store_words_kernel(out_ptr, seed_low, seed_high, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the words (ROWS, COLUMNS) of rows first_row …, as int32."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    words = element_words(seed_low, seed_high, first_row + rows, columns)
    tl.store(out_ptr + rows[:, None] * COLUMNS + columns[None, :], words.to(tl.int32, bitcast=True))
