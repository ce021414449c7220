"""Which modules a client trains: keyed, independent of call order, uniform."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fed.errors import FedError
from fed.select import random_selection
from fed.streams import permutation, seed_of

KEY = {"seed": 3, "round_number": 2, "client": 7, "matrix": "layer.0.q_proj", "rank": 16, "budget": 5}


def test_selection_is_sorted_distinct_and_of_the_budget() -> None:
    chosen = random_selection(**KEY)
    assert len(set(chosen)) == 5
    assert list(chosen) == sorted(chosen)
    assert all(type(index) is int and 0 <= index < 16 for index in chosen)


def test_selection_does_not_depend_on_the_order_of_calls() -> None:
    keys = [KEY | {"client": client, "matrix": f"layer.{n}"} for client in range(3) for n in range(4)]
    forwards = [random_selection(**key) for key in keys]
    backwards = [random_selection(**key) for key in reversed(keys)]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("change", [{"seed": 4}, {"round_number": 3}, {"client": 8}, {"matrix": "layer.0.v_proj"}])
def test_each_part_of_the_key_gives_another_draw(change: dict[str, int | str]) -> None:
    one = [random_selection(**KEY | {"rank": 200 + n, "budget": 100}) for n in range(3)]
    other = [random_selection(**KEY | change | {"rank": 200 + n, "budget": 100}) for n in range(3)]
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_neighbouring_numbers_do_not_run_together() -> None:
    assert len({seed_of(1, 23), seed_of(12, 3), seed_of("1", 23), seed_of("1,23"), seed_of(1, 2, 3)}) == 5


def test_all_and_none_can_be_selected() -> None:
    assert random_selection(**KEY | {"budget": 16}) == tuple(range(16))
    assert random_selection(**KEY | {"budget": 0}) == ()


def test_a_budget_beyond_the_rank_is_an_error_naming_both() -> None:
    with pytest.raises(FedError, match="client 7 cannot train 17 modules of 16"):
        random_selection(**KEY | {"budget": 17})
    with pytest.raises(FedError, match="cannot train -1 modules"):
        random_selection(**KEY | {"budget": -1})


def test_every_module_is_as_likely_as_another() -> None:
    rounds, rank, budget = 2000, 5, 2
    counts = Counter(index for n in range(rounds) for index in random_selection(0, n, 1, "m", rank, budget))
    expected = rounds * budget / rank  # 800, standard deviation 22
    assert all(abs(counts[index] - expected) < 110 for index in range(rank))


def test_the_draw_is_fixed_for_good() -> None:
    assert random_selection(0, 1, 2, "classifier", 8, 3) == (1, 4, 7)
    assert permutation(6, 0, "clients").tolist() == [3, 1, 4, 5, 2, 0]


def test_a_permutation_holds_every_number_once() -> None:
    np.testing.assert_array_equal(np.sort(permutation(37, 1, "x")), np.arange(37))
    assert permutation(0, 1, "x").shape == (0,)
