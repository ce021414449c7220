"""Tables of tiles: made once for groups that cannot change, and freed with them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import plora_kernels as pk
from plora_kernels.tile_tables import tables_of
from tests.support.notes import note_calls
from tests.support.numerics import DEVICE

pytestmark = pytest.mark.usefixtures("kernels")
K, N, RANK = 20, 12, 5


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int, int]]:
    """Return a list that receives the arguments of every table that is made."""
    from plora_kernels.kernels import grouped_tiles

    return note_calls(monkeypatch, grouped_tiles, "_make_table", lambda offsets, *rest: (offsets.clone(), *rest))


def operands(sizes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Return x, weight, and A and B of each group."""
    shapes = (sum(sizes), K), (N, K), (len(sizes), RANK, K), (len(sizes), N, RANK)
    generator = torch.Generator().manual_seed(seed)
    x, weight, A, B = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    return x.requires_grad_(), weight, A.requires_grad_(), B.requires_grad_()


def by_rows(rows: pk.RowGroups, x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
    y = pk.GroupModules.of(rows, A, B, dropout_p=0.25, dropout_seeds=[3] * len(rows)).linear(x, weight, None)
    return [y, *torch.autograd.grad(y.square().sum(), (x, A, B))]


def by_offsets(offsets: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
    form = {"unselected": "frozen", "dropout_p": 0.25, "dropout_seed": [3] * (len(offsets) - 1)}
    y = pk.plora_linear(x, weight, A, B, groups=offsets, **form)
    return [y, *torch.autograd.grad(y.square().sum(), (x, A, B))]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_every_layer_and_pass_takes_the_table_of_the_first(made: list) -> None:
    rows, given = pk.RowGroups((40, 0, 25)), operands((40, 0, 25))
    first = by_rows(rows, *given)
    heights = [height for _, _, height in made]
    assert heights
    assert len(set(heights)) == len(heights), "a table was made twice"
    for seed in (0, 1):  # recorded and replayed, by the same layer and by another
        again = by_rows(rows, *operands((40, 0, 25), seed))
        assert equal(again, first) == (seed == 0)
    assert len(made) == len(heights)


def test_other_groups_of_the_same_form_have_tables_of_their_own(made: list) -> None:
    for sizes in ((40, 0, 25), (1, 63, 1), (0, 65, 0)):
        given, before = operands(sizes), len(made)
        found = by_rows(pk.RowGroups(sizes), *given)
        assert len(made) > before
        offsets = torch.tensor([0, sizes[0], sizes[0] + sizes[1], 65], device=DEVICE)
        assert equal(found, by_offsets(offsets, *given))


def test_offsets_that_may_change_are_looked_at_in_every_call(made: list) -> None:
    given, offsets = operands((40, 0, 25)), torch.tensor([0, 40, 40, 65], device=DEVICE)
    assert tables_of(offsets) is None
    by_offsets(offsets, *given)
    once = len(made)
    offsets.data.copy_(torch.tensor([0, 1, 64, 65]))  # a write by `.data` does not count as a new version
    found = by_offsets(offsets, *given)
    assert len(made) == 2 * once
    assert equal(found, by_rows(pk.RowGroups((1, 63, 1)), *given))


def test_tables_go_with_the_groups() -> None:
    rows, given = pk.RowGroups((40, 0, 25)), operands((40, 0, 25))
    for _ in range(2):
        by_rows(rows, *given)
    tables = [weakref.ref(table) for table in (tables_of(rows.offsets(given[0])) or {}).values()]
    assert tables
    assert all(table() is not None for table in tables)
    del rows
    gc.collect()
    assert all(table() is None for table in tables)


def test_a_table_made_in_inference_mode_serves_training(made: list) -> None:
    rows, given = pk.RowGroups((40, 0, 25)), operands((40, 0, 25))
    with torch.inference_mode():
        pk.GroupModules.of(rows, *given[2:]).linear(given[0], given[1], None)
    assert made
    assert equal(by_rows(rows, *given), by_rows(pk.RowGroups((40, 0, 25)), *given))
