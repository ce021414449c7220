"""Combinations of parameters in which every pair of values occurs (pairwise testing)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Pair = tuple[tuple[int, int], ...]


def pairwise(*values: Sequence, special: Sequence[tuple] = ()) -> list[tuple]:
    """Choose combinations so that any two values of any two parameters occur together in at least one.

    A fault almost always depends on one value or on two together, and these find it as the full product does. Three
    parameters of 9, 4 and 3 values give 36 combinations instead of 108. The `special` combinations come first, and
    pairs in them need no others. The same arguments give the same combinations.
    """
    order = sorted(range(len(values)), key=lambda place: -len(values[place]))  # widest first: fewest combinations
    sizes = [len(values[place]) for place in order]
    chosen = [tuple(values[place].index(one[place]) for place in order) for one in special]
    numbered = [[(place, number) for number in range(size)] for place, size in enumerate(sizes)]
    missing = {pair for two in itertools.combinations(numbered, 2) for pair in itertools.product(*two)}
    missing -= {pair for one in chosen for pair in _pairs(one)}
    while missing:
        grown = [_grown(start, missing, chosen, sizes) for start in sorted(missing)]
        chosen.append(max(grown, key=lambda one: sum(pair in missing for pair in _pairs(one))))
        missing.difference_update(_pairs(chosen[-1]))
    return [tuple(known[one[order.index(place)]] for place, known in enumerate(values)) for one in chosen]


def _pairs(one: Sequence[int]) -> list[Pair]:
    return list(itertools.combinations(enumerate(one), 2))


def _grown(start: Pair, missing: set[Pair], chosen: list[tuple[int, ...]], sizes: list[int]) -> tuple[int, ...]:
    """Give each other parameter the value that is in most missing pairs; among equals, the one used least."""
    taken = dict(start)
    for place in sorted({*range(len(sizes))} - {*taken}):
        worth = []
        for value in range(sizes[place]):
            gained = sum(tuple(sorted(((place, value), other))) in missing for other in taken.items())
            worth.append((gained, -sum(one[place] == value for one in chosen)))
        taken[place] = worth.index(max(worth))
    return tuple(taken[place] for place in range(len(sizes)))
