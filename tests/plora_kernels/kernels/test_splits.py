"""How the rows of dA and dB are split for a device, and that every split gives the gradient."""

from __future__ import annotations

import pytest
import torch

from plora_kernels.kernels import factor_gradient, output_gradient
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import GradientBlocks, MatmulBlocks, OutputGradientBlocks, row_splits
from tests.support.groups import draw_grouped
from tests.support.numerics import DEVICE, check, make_problem, random_mask

# Rows, and their number of parts on eight multiprocessors, with one tile of columns and R = 1.
ROWS = {1: 1, 31: 1, 47: 2, 129: 8}


@pytest.mark.parametrize(
    ("rows", "width", "programs", "waves", "multiprocessors", "splits"),
    [
        (8192, 16, 32, 2, 132, 9),  # 264 programs wanted, 32 there
        (8192, 64, 32, 2, 132, 8),  # at least 1,024 rows in a part
        (8192, 256, 128, 2, 132, 2),  # 4,096
        (8192, 16, 500, 2, 132, 1),
        (512, 16, 32, 2, 132, 2),
        (255, 16, 1, 4, 132, 1),
        (0, 16, 1, 4, 132, 1),
        (8192, 16, 32, 1, 304, 10),  # a larger device makes more parts
    ],
)
def test_splits_fill_the_device(
    rows: int, width: int, programs: int, waves: int, multiprocessors: int, splits: int
) -> None:
    assert row_splits(rows, width, programs, 64, waves, multiprocessors) == splits


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch, kernels: None, nan_filled: None) -> list[int]:
    """Let there be eight multiprocessors; return a list that receives the splits of every gradient."""
    found: list[int] = []

    def noted(*sizes: int) -> int:
        found.append(row_splits(*sizes))
        return found[-1]

    monkeypatch.setattr(lookup, "multiprocessors_of", lambda device: 8)
    for module in (factor_gradient, output_gradient):
        monkeypatch.setattr(module, "row_splits", noted)
    return found


def forced(design: str) -> dict:
    matmul = MatmulBlocks(design, 16, 16, 16, 16, 2, 4, 2)
    return {
        "forward": matmul,
        "input_gradient": matmul,
        "factor_gradient": GradientBlocks(16, 16, 16, 1, 4, 2),
        "output_gradient": OutputGradientBlocks(16, 16, 16, 1, 4, 2),
    }


@pytest.mark.parametrize("design", ["tile", "tile_two_launch"])
@pytest.mark.parametrize("form", [None, "folded", "frozen"])
@pytest.mark.parametrize("rows", ROWS)
def test_any_cut_gives_the_gradients(rows: int, form: str | None, design: str, cuts: list[int]) -> None:
    mask = None if form is None else torch.tensor([False, True], device=DEVICE)
    rank = 1 if form is None else 2
    problem = make_problem(rows, 16, 16, rank, torch.float32, mask=mask, unselected=form or "folded", seed=rows)
    with lookup.override_blocks(forced(design)):
        check(problem)
    assert len(cuts) == 2  # dA and dB
    if form is None:
        assert set(cuts) == {ROWS[rows]}


@pytest.mark.parametrize("design", ["tile", pytest.param("tile_two_launch", marks=pytest.mark.slow)])
def test_wide_gradients_of_many_columns_are_whole(design: str, cuts: list[int]) -> None:
    problem = make_problem(70, 200, 136, 5, torch.float32, mask=random_mask(5, 1))
    with lookup.override_blocks(forced(design)):
        check(problem)
    assert set(cuts) == {1}


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [(80, 0, 97), (1, 5, 30)])
def test_groups_are_cut_each_for_itself(rows: tuple[int, ...], p: float, cuts: list[int]) -> None:
    problem = draw_grouped(rows, 16, 16, 1, torch.float32, scale=[0.5, 0.25, 2.0], dropout_p=p)
    with lookup.override_blocks(forced("tile")):
        check(problem)
    assert set(cuts) == ({3} if rows[0] == 80 else {1})
