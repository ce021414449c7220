"""Groups of rows with their own modules in one call equal one call for each group, in both implementations."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from plora_kernels.fallback import grouped_products
from tests.support.equality import assert_equal
from tests.support.groups import DEVICE, FORMS, draw_grouped, run_each_group
from tests.support.numerics import check, make_problem, run
from tests.support.pairwise import pairwise
from tests.support.tiers import mostly_slow

# Groups' rows, K, N, R.
SHAPES = (
    ((70, 70, 70), 12, 9, 8),
    ((1,), 1, 1, 1),
    ((0, 7, 0, 19, 7, 7, 1, 0), 50, 29, 5),
    ((33, 16, 0), 24, 40, 17),
    ((5, 5, 5, 5), 64, 16, 33),
)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(
    ("shape", "selection", "p", "dtype", "bias"),
    mostly_slow(pairwise(SHAPES, FORMS, [0.0, 0.4], [torch.float32, torch.float16], [False, True]), 25),
    ids=str,
)
def test_results_are_within_the_bound(
    shape: tuple, selection: tuple[float | None, str], p: float, dtype: torch.dtype, bias: bool, each_backend: str
) -> None:
    sizes, k, n, rank = shape
    share, form = selection
    scales = [0.5 + g for g in range(len(sizes))] if share is None else 0.5
    options = {"share": share, "unselected": form, "dropout_p": p, "scale": scales, "bias": bias}
    check(draw_grouped(sizes, k, n, rank, dtype, **options))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("offsets", [[0, 3, 3, 20, 36, 36], [0, 0, 1], [0, 40], [0, *range(200)]], ids=len)
def test_the_table_of_tiles_by_hand(offsets: list[int]) -> None:
    from plora_kernels.kernels.grouped_tiles import grouped_tiles

    expected = [
        [group, first, end, first - start]
        for group, (start, end) in enumerate(itertools.pairwise(offsets))
        for first in range(start, end, 16)
    ]
    table = grouped_tiles(torch.tensor(offsets, device=DEVICE), offsets[-1], 16).tolist()
    assert table[: len(expected)] == expected
    assert all(row[0] == -1 for row in table[len(expected) :])


@pytest.mark.usefixtures("kernels")
def test_gradients_of_the_kernels_are_deterministic() -> None:
    for problem in (draw_grouped((700, 0, 1100), 20, 9, 5, torch.float32), make_problem(1100, 20, 9, 5, torch.float32)):
        assert_equal(run(problem), run(problem))


def random_cases(count: int, seed: int) -> list[tuple]:
    source = random.Random(seed)
    forms = itertools.cycle(itertools.product(("folded", "frozen"), (None, 0.0, 0.3, 0.8, 1.0)))
    cases = []
    for number, (form, share) in zip(range(count), forms, strict=False):
        sizes = tuple(source.choice([0, 1, 2, 16, 17, 33, 65, 130]) for _ in range(source.choice([1, 2, 3, 7])))
        # Not K = R = 1, where a gradient is a single sum, which may be exact by luck.
        shape = [source.choice([2, 7, 15, 16, 33, 64, 100]) for _ in range(2)]
        cases.append((sizes, *shape, source.choice([1, 2, 5, 16, 17, 40]), form, share, number))
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", random_cases(30, seed=1), ids=lambda case: "-".join(map(str, case[:6])))
def test_random_groups_on_the_torch_path(case: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    *shape, form, share, number = case
    p = 0.3 if number % 4 == 1 else 0.0
    check(draw_grouped(*shape, dtype, share=share, unselected=form, dropout_p=p, seed=number))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("share", "form"), FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_at_once_equal_one_call_a_group(shape: tuple, share: float | None, form: str, p: float) -> None:
    options = {"share": share, "unselected": form, "dropout_p": p, "device": "cpu"}
    problem = draw_grouped(*shape, torch.float64, scale=[1.0 / (g + 1) for g in range(len(shape[0]))], **options)
    torch.testing.assert_close(run(problem), run_each_group(problem), rtol=1e-12, atol=1e-12)


def test_when_weights_of_their_own_pay() -> None:
    def pays(rows: int, groups: int, n: int, k: int, rank: int) -> bool:
        return grouped_products.group_weights_are_cheaper(rows, groups, torch.empty(n, k, device="meta"), rank)

    # Ten clients of 16 × 17 rows and 64 features: 272·64² + 4·64²·16 multiplications against 2·272·3·16·128.
    assert pays(2720, 10, 64, 64, 16)
    assert pays(16, 1, 128, 128, 16)  # more multiplications, but fewer calls
    assert not pays(7, 1, 128, 128, 16)
    assert not pays(160, 10, 512, 128, 16)
    assert not pays(20480, 10, 768, 768, 16)
    assert not pays(20480, 10, 768, 768, 128)  # fewer multiplications, but a large weight for each client


@pytest.mark.parametrize("by_weights", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_of_plain_products_are_within_the_bound(
    shape: tuple, by_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    monkeypatch.setattr(grouped_products, "group_weights_are_cheaper", lambda *_: by_weights)
    scales = [0.5 + g for g in range(len(shape[0]))]
    for scale in (0.5, scales):
        check(draw_grouped(*shape, torch.float32, scale=scale))
