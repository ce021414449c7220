"""The random word of an element, computed with Python's integers."""

from __future__ import annotations

MASK = 2**32 - 1


def mixed_by_hand(word: int) -> int:
    """Return the mixer of a 32-bit word."""
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & MASK
    word = ((word ^ (word >> 15)) * 0x846CA68B) & MASK
    return word ^ (word >> 16)


def word_by_hand(seed: int, row: int, column: int) -> int:
    """Return the word of element (row, column) under a seed of 64 bits."""
    low, high = seed & MASK, (seed >> 32) & MASK
    start = mixed_by_hand(row ^ mixed_by_hand(low))
    key = mixed_by_hand((start + mixed_by_hand(high ^ 0x9E3779B9)) & MASK)
    word = (start + column * 0x9E3779B9) & MASK
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & MASK
    return ((word ^ (word >> 15) ^ key) * 0x846CA68B) & MASK
