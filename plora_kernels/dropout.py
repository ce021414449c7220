"""LoRA dropout's mask: which elements of x a seed keeps, the same bits in torch and in the kernels.

Element (row, column) has a 32-bit word h of its own, a hash of (seed, row, column); it is kept where h ≥ p·2³². Every
use makes the word anew: nothing is stored between forward and backward, and neither tiling nor device enters. The word
is a row's SplitMix-like walk, h = mix(r + column·G) with r, q = keys(seed, row) and q mixed in between, by a published
32-bit integer mixer (C. Wellons, "Prospecting for hash functions", 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9  # 2³²/φ, odd: SplitMix's step
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
_CHUNK_ELEMENTS = 1 << 16  # int32 words that stay in a core's cache through the dozen passes over them


def threshold(p: float) -> int:
    """Return p·2³¹, rounded: words are compared by their upper 31 bits, which fit a signed integer."""
    return min(round(p * 2**31), 2**31 - 1)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Return the bool mask (rows, columns) of what dropout of probability p keeps.

    Args:
        seed: one int64 number, on the device the mask is wanted on; it is not read on the host.
    """
    return keep_mask_of_rows(seed.reshape(()), torch.arange(rows, dtype=torch.int64, device=seed.device), columns, p)


def keep_mask_of_rows(seeds: Tensor, numbers: Tensor, columns: int, p: float) -> Tensor:
    """Return the bool mask (rows, columns) whose rows are those of the given numbers under the given seeds.

    Args:
        seeds: int64, (rows,) or one for all rows.
        numbers: int64 (rows,), each row's number under its seed; its low 32 bits count.
    """
    device, rows = numbers.device, numbers.shape[0]
    kept = torch.empty((rows, columns), dtype=torch.bool, device=device)
    steps = _wrapped(torch.arange(columns, dtype=torch.int64, device=device) * GOLDEN)  # (columns,)
    starts, keys = _row_keys(seeds, numbers)  # (rows,) each
    chunk = max(1, _CHUNK_ELEMENTS // max(1, columns)) if device.type == "cpu" else max(1, rows)
    bound = threshold(p)
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        word = starts[part, None] + steps
        shifted = _shift(word, 16)
        word.bitwise_xor_(shifted).mul_(_signed(FIRST))
        torch.bitwise_right_shift(word, 15, out=shifted).bitwise_and_(2**17 - 1)
        word.bitwise_xor_(shifted).bitwise_xor_(keys[part, None]).mul_(_signed(SECOND))
        torch.ge(torch.bitwise_right_shift(word, 1, out=shifted).bitwise_and_(2**31 - 1), bound, out=kept[part])
    return kept


def multiplier(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """Return (rows, columns) of 1/(1−p) where an element is kept and 0 where it is dropped."""
    return keep_mask(seed, rows, columns, p).to(dtype).mul_(1 / (1 - p))


def _row_keys(seed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a row's two 32-bit keys, where its walk begins and what is mixed into it, as int32 (rows,)."""
    low, high = seed & (2**32 - 1), (seed >> 32) & (2**32 - 1)
    start = _mix((rows & (2**32 - 1)) ^ _mix(low))
    key = _mix((start + _mix(high ^ GOLDEN)) & (2**32 - 1))
    return _wrapped(start), _wrapped(key)


def _mix(word: Tensor) -> Tensor:
    """Return the mixed 32-bit words, held in int64."""
    word = ((word ^ (word >> 16)) * FIRST) & (2**32 - 1)
    word = ((word ^ (word >> 15)) * SECOND) & (2**32 - 1)
    return word ^ (word >> 16)


def _wrapped(word: Tensor) -> Tensor:
    """Return the low 32 bits of int64 words as int32."""
    low = word & (2**32 - 1)
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Return int32 words shifted right with zeros moved in."""
    return (word >> bits).bitwise_and_(2 ** (32 - bits) - 1)


def _signed(constant: int) -> int:
    """Return a 32-bit constant as int32 holds it."""
    return constant - 2**32 if constant >= 2**31 else constant
