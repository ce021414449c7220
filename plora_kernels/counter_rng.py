"""A random 32-bit word for every element of a matrix, the same bits in torch and in the kernels.

The word of element (row, column) is a hash of (seed, row, column) alone: nothing is stored, and it does not depend on
the tiling or the device. Along a row it is a SplitMix-like sequence, start + column·G, through a published 32-bit mixer
(C. Wellons, "Prospecting for hash functions", 2018), with a second key of the row mixed in half way:

    start = mix(row ⊕ mix(seed's low half)),  key = mix(start + mix(seed's high half ⊕ G))
    u = start + column·G;  v = (u ⊕ u≫16)·F;  word = (v ⊕ v≫15 ⊕ key)·S        all modulo 2³²

The mixer's last shift is left out: it would change the lower half of the word only, and users take the upper bits.

LoRA dropout keeps element (row, column) of x where its word, read as a signed integer, is at least p·2³² − 2³¹, so the
backward can recompute the forward's mask. Stochastic rounding to half precision rounds a value v between two
neighbours lo < v < hi of the target dtype to hi with probability (v − lo)/(hi − lo), by the upper bits of the
element's word: the expectation of the result is v, however a matrix is cut into tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 17  # int32 words per thread: few enough to stay in a core's cache for about a dozen passes
ROUNDINGS = ("nearest", "stochastic")
HALF = (torch.float16, torch.bfloat16)

GOLDEN = 0x9E3779B9  # G: 2³²/φ, odd, SplitMix's step
FIRST, SECOND = 0x7FEB352D, 0x846CA68B  # F and S

_WORD = 2**32 - 1


def seed_halves(seed: int) -> tuple[int, int]:
    """Return the low and the high half of a 64-bit seed as int32."""
    return signed(seed & _WORD), signed((seed >> 32) & _WORD)


def row_keys(seeds: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows' starts and keys, (rows,) int32, for seeds int64, (rows,) or one, and row numbers int64 (rows,).

    Only the low 32 bits of a row number are used. Nothing is read on the host.
    """
    low, high = seeds & _WORD, (seeds >> 32) & _WORD
    starts = _mixed((rows & _WORD) ^ _mixed(low))
    keys = _mixed((starts + _mixed(high ^ GOLDEN)) & _WORD)
    return _wrapped(starts), _wrapped(keys)


def column_steps(columns: int, device: torch.device) -> Tensor:
    """Return column·G for the columns 0 … columns−1, int32."""
    return _wrapped(torch.arange(columns, dtype=torch.int64, device=device) * GOLDEN)


def element_words(starts: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """Return the words (rows, columns), int32, of rows with these `row_keys` and columns with these `column_steps`."""
    word = starts[:, None] + steps
    shifted = shifted_right(word, 16)
    word.bitwise_xor_(shifted).mul_(signed(FIRST))
    torch.bitwise_right_shift(word, 15, out=shifted).bitwise_and_(2**17 - 1)
    return word.bitwise_xor_(shifted).bitwise_xor_(keys[:, None]).mul_(signed(SECOND))


def shifted_right(word: Tensor, places: int) -> Tensor:
    """Return int32 words shifted right logically, filled with zeros."""
    return (word >> places).bitwise_and_(2 ** (32 - places) - 1)


def signed(word: int) -> int:
    """Return a 32-bit word as the int32 of the same bits."""
    return word - 2**32 if word >= 2**31 else word


def _mixed(word: Tensor) -> Tensor:
    """Return the mixed 32-bit words, held in int64."""
    word = ((word ^ (word >> 16)) * FIRST) & _WORD
    word = ((word ^ (word >> 15)) * SECOND) & _WORD
    return word ^ (word >> 16)


def _wrapped(word: Tensor) -> Tensor:
    """Return the low 32 bits of int64 words as int32."""
    low = word & _WORD
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def threshold(p: float) -> int:
    """Return p·2³² − 2³¹, rounded: the smallest word, read as int32, whose element is kept."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Return the bool mask (rows, columns) of the elements that dropout of probability p keeps.

    Args:
        seed: one int64 number on the device of the mask; it is not read on the host.
    """
    return keep_mask_of_rows(seed.reshape(()), torch.arange(rows, dtype=torch.int64, device=seed.device), columns, p)


def keep_mask_of_rows(seeds: Tensor, numbers: Tensor, columns: int, p: float) -> Tensor:
    """Return the bool mask (rows, columns) for given row numbers and seeds: row i is row numbers[i] of seeds[i]'s mask.

    Args:
        seeds: int64, (rows,) or one for all rows.
        numbers: int64 (rows,), of which only the low 32 bits are used.
    """
    device, rows = numbers.device, numbers.shape[0]
    kept = torch.empty((rows, columns), dtype=torch.bool, device=device)
    steps, (starts, keys) = column_steps(columns, device), row_keys(seeds, numbers)
    chunk = max(1, rows)
    if device.type == "cpu":
        # torch.compile cannot trace get_num_threads.
        threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
        chunk = max(1, threads * _CHUNK_ELEMENTS // max(1, columns))
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        torch.ge(element_words(starts[part], keys[part], steps), threshold(p), out=kept[part])
    return kept


def multiplier(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """Return (rows, columns) of 1/(1−p) where an element is kept and 0 where it is dropped."""
    return keep_mask(seed, rows, columns, p).to(dtype).mul_(1 / (1 - p))


def element_bits(seed: int, first_row: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the random words of the elements of rows first_row …: (rows, columns) int32."""
    numbers = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)
    seeds = torch.full((), seed, dtype=torch.int64, device=device)  # filled on the device: no copy from the host
    return element_words(*row_keys(seeds, numbers), column_steps(columns, device))


def round_stochastically(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 values in `dtype` (float16 or bfloat16), rounded up or down by their random bits (int32).

    NaN, infinities and values beyond the largest finite one are rounded to nearest. The expectation is exact for
    bfloat16, and for float16 except in subnormals, where the probability is rounded to a multiple of 2⁻²⁴.
    """
    words = values.view(torch.int32)
    if dtype is torch.bfloat16:
        rounded = (words + shifted_right(bits, 16)).bitwise_and_(-1 << 16).view(torch.float32)
    else:
        rounded = (words + shifted_right(bits, 19)).bitwise_and_(-1 << 13)
        # Below 2⁻¹⁴ float16 is subnormal: its spacing is 2⁻²⁴ for every exponent.
        steps = values.abs() * 2.0**24
        whole = steps.floor()
        up = shifted_right(bits, 8).to(torch.float32) * 2.0**-24 < steps - whole
        small = ((whole + up) * 2.0**-24).view(torch.int32) | (words & signed(1 << 31))
        rounded = torch.where(steps < 2.0**10, small, rounded).view(torch.float32)
    ordinary = values.abs() <= torch.finfo(dtype).max
    return torch.where(ordinary, rounded, values).to(dtype)
