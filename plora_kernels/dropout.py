"""LoRA dropout's mask: which elements of x a seed keeps, the same bits in torch and in the kernels.

Element (row, column) is kept where its word (`hashing`), read as a signed integer, is at least p·2³² − 2³¹. Every use
makes the word anew: nothing is stored between forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hashing import column_steps, element_words, row_keys

_CHUNK_ELEMENTS = 1 << 17  # int32 words that stay in a core's cache through the dozen passes over them


def threshold(p: float) -> int:
    """Return p·2³² − 2³¹, rounded: the least word, as int32, that is kept."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


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
    steps, (starts, keys) = column_steps(columns, device), row_keys(seeds, numbers)
    chunk = max(1, rows)
    if device.type == "cpu":
        threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()  # a compiler cannot ask
        chunk = max(1, threads * _CHUNK_ELEMENTS // max(1, columns))
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        torch.ge(element_words(starts[part], keys[part], steps), threshold(p), out=kept[part])
    return kept


def multiplier(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """Return (rows, columns) of 1/(1−p) where an element is kept and 0 where it is dropped."""
    return keep_mask(seed, rows, columns, p).to(dtype).mul_(1 / (1 - p))
