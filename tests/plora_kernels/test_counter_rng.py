"""The random word of an element: computed by hand, the same in kernels, uniform and independent of others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plora_kernels.counter_rng import column_steps, element_bits, element_words, row_keys, seed_halves
from tests.support.hashing import word_by_hand
from tests.support.numerics import DEVICE

SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF)


def words_of(seed: int, rows: Tensor, columns: int) -> Tensor:
    return element_words(*row_keys(torch.tensor(seed), rows), column_steps(columns, rows.device))


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_the_ones_worked_out_by_hand(seed: int) -> None:
    rows = torch.tensor([0, 1, 2, 65535, 2**31 + 3, 2**32 - 1])
    expected = [[word_by_hand(seed, row, column) for column in range(70)] for row in rows.tolist()]
    assert (words_of(seed, rows, 70).long() & (2**32 - 1)).tolist() == expected


def test_a_rows_number_counts_by_its_low_32_bits() -> None:
    rows = torch.tensor([5, -1])
    assert torch.equal(words_of(3, rows, 9), words_of(3, torch.tensor([2**40 + 5, 2**32 - 1]), 9))


def test_every_row_may_have_a_seed_of_its_own() -> None:
    keys = row_keys(torch.tensor([7, 2**40]), torch.tensor([4, 4]))
    together = element_words(*keys, column_steps(6, torch.device("cpu")))
    for row, seed in zip(together, (7, 2**40), strict=True):
        assert torch.equal(row[None], words_of(seed, torch.tensor([4]), 6))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kernels_make_the_same_words(seed: int) -> None:
    from tests.support.word_kernel import store_words_kernel

    out = torch.empty(16, 32, dtype=torch.int32, device=DEVICE)
    store_words_kernel[(1,)](out, *seed_halves(seed), 2**20 + 7, ROWS=16, COLUMNS=32)
    assert torch.equal(out.cpu(), words_of(seed, torch.arange(16) + 2**20 + 7, 32))


def test_random_bits_are_even_and_unrelated_between_neighbours_and_seeds() -> None:
    rows, columns = 512, 257
    cpu = torch.device("cpu")
    words = [element_bits(seed, 0, rows, columns, cpu) for seed in (0, 1)]
    ones = torch.stack([(words[0] >> place) & 1 for place in range(32)]).double() * 2 - 1  # (32, rows, columns)
    count = rows * columns
    limit = 5 / count**0.5
    assert ones.mean((1, 2)).abs().max().item() < limit
    high = ones[16:]
    other = torch.stack([(words[1] >> place) & 1 for place in range(16, 32)]).double() * 2 - 1
    for name, first, second in (
        ("columns", high[:, :, 1:], high[:, :, :-1]),
        ("rows", high[:, 1:], high[:, :-1]),
        ("seeds", high, other),
        ("places", high[1:], high[:-1]),
    ):
        assert (first * second).mean((1, 2)).abs().max().item() < limit, name


def test_random_bits_depend_on_the_place_and_not_on_the_tiling() -> None:
    cpu = torch.device("cpu")
    whole = element_bits(3, 0, 20, 33, cpu)
    assert torch.equal(element_bits(3, 7, 5, 33, cpu), whole[7:12])
    assert torch.equal(element_bits(3, 0, 20, 9, cpu), whole[:, :9])
