"""A random 32-bit word for every element of a matrix, the same bits in torch and in the kernels.

The word of element (row, column) is a hash of (seed, row, column) alone: nothing is stored, and neither tiling nor
device enters. It is a row's SplitMix-like walk through a published 32-bit mixer (C. Wellons, "Prospecting for hash
functions", 2018), with a second key of the row mixed in half way:

    start = mix(row ⊕ mix(seed's low half)),  key = mix(start + mix(seed's high half ⊕ G))
    u = start + column·G;  v = (u ⊕ u≫16)·F;  word = (v ⊕ v≫15 ⊕ key)·S        all modulo 2³²

The mixer's last shift is left out, since it would change the lower half only: who draws takes bits from the top.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9  # G: 2³²/φ, odd, SplitMix's step
FIRST, SECOND = 0x7FEB352D, 0x846CA68B  # F and S

_WORD = 2**32 - 1


def seed_halves(seed: int) -> tuple[int, int]:
    """Return the low and the high half of a 64-bit seed as int32."""
    return signed(seed & _WORD), signed((seed >> 32) & _WORD)


def row_keys(seeds: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows' starts and keys, (rows,) int32, for seeds int64, (rows,) or one, and row numbers int64 (rows,).

    A row number's low 32 bits count. Nothing is read on the host.
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
    """Return int32 words shifted right, zeros moving in."""
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
