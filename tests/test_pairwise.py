"""The combinations of `tests/support/pairwise.py` hold every pair of values."""

from __future__ import annotations

import itertools

import pytest

from tests.support.pairwise import pairwise


@pytest.mark.parametrize("sizes", [(9, 4, 3, 2, 2), (5, 5, 2, 2, 2), (2, 2, 2, 2, 3), (3, 1, 4), (7, 6), (6, 6, 6, 6)])
def test_every_pair_of_values_is_there(sizes: tuple[int, ...]) -> None:
    values = [[f"{place}-{number}" for number in range(size)] for place, size in enumerate(sizes)]
    found = pairwise(*values)
    for (a, first), (b, second) in itertools.combinations(enumerate(values), 2):
        assert {(one[a], one[b]) for one in found} == {*itertools.product(first, second)}
    assert all(value in known for one in found for value, known in zip(one, values, strict=True))
    assert len(found) < 2 * max(one * other for one, other in itertools.combinations(sizes, 2))


def test_special_combinations_are_there_and_count() -> None:
    special = [(2, "c", False), (0, "c", True)]
    found = pairwise([0, 1, 2], ["a", "b", "c"], [False, True], special=special)
    assert found[:2] == special
    assert len(found) == len({*found}) == 9


def test_the_same_arguments_give_the_same_combinations() -> None:
    arguments = ([0, 1, 2], ["a", "b"], [False, True], [None, "x"])
    assert pairwise(*arguments) == pairwise(*arguments)
