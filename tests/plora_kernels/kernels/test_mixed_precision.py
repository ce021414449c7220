"""fp32 factors beside half precision in every kernel: rounded as they are loaded, their gradients fp32 sums.

The same call with factors that were rounded before must give the same bits: a kernel may not see more of a factor than
half precision has, nor read it as something else. dA and dB, once rounded, are those of that call, and before that they
hold more digits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import plora_kernels as pk
from plora_kernels.kernels import (
    adapted_matmul,
    factor_gradient,
    grouped_tiles,
    linear,
    output_gradient,
    persistent_matmul,
    projections_backward,
    projections_forward,
    side_product,
    tile_matmul,
)
from plora_kernels.kernels.factor_gradient import factor_gradient_
from plora_kernels.kernels.grouped_tiles import Groups
from plora_kernels.kernels.output_gradient import output_gradient_
from plora_kernels.selection import index_buffer
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import ALGEBRA_DESIGNS, DESIGNS, GradientBlocks, MatmulBlocks
from tests.plora_kernels.kernels.test_designs import blocks_of
from tests.plora_kernels.ops.test_projections import make_problems, operands_of
from tests.plora_kernels.ops.test_projections import run as run_projections
from tests.support.equality import assert_equal
from tests.support.groups import draw_grouped
from tests.support.mixed_precision import assert_rounded_once, check_mixed, rounded, widened
from tests.support.notes import note_calls
from tests.support.numerics import DEVICE, Problem, in_form, make_problem, run
from tests.support.pairwise import pairwise

HALF = torch.float16
LAUNCHING = (
    factor_gradient, grouped_tiles, output_gradient, persistent_matmul, projections_backward, projections_forward,
    side_product, tile_matmul,
)  # fmt: skip


@pytest.fixture(autouse=True)
def on_kernels(kernels: None, nan_filled: None) -> None:
    """Run on the kernels, every output filled with NaN first."""


def assert_only_rounded(found: Tensor, expected: Tensor) -> None:
    """Assert that a gradient in fp32 is one of half precision before it was rounded."""
    assert found.dtype is torch.float32
    assert torch.equal(found.to(expected.dtype), expected)
    if expected.any():
        assert not torch.equal(found, expected.float())


def assert_as_rounded_before(problem: Any) -> None:
    """Assert that a problem of fp32 factors gives y, dx and dbias of rounded ones bit by bit, and dA and dB in fp32."""
    y, dx, dA, dB, dbias = run(problem)
    expected = run(rounded(problem))
    assert_equal((y, dx, dbias), (expected[0], expected[1], expected[4]))
    assert_only_rounded(dA, expected[2])
    assert_only_rounded(dB, expected[3])


@pytest.mark.parametrize(
    ("design", "shape", "form", "bias"),
    pairwise(DESIGNS, [(7, 50, 29, 5), (37, 48, 80, 17)], [None, "folded", "frozen"], [False, True]),
)
def test_factors_are_rounded_as_they_are_loaded(
    design: str, shape: tuple[int, int, int, int], form: str | None, bias: bool
) -> None:
    rank = shape[-1]
    problem = widened(make_problem(*shape, HALF, **in_form(form, rank, rank), bias=bias, scale=1.0, seed=rank))
    with lookup.override_blocks(blocks_of(design, 16)):
        if design in ALGEBRA_DESIGNS and form is None:
            check_mixed(problem)  # torch's products round gradients of half precision twice on CPU
        else:
            assert_as_rounded_before(problem)


@pytest.mark.parametrize(("design", "form"), [("tile", "frozen"), ("two_launch", "folded"), ("algebra_first", None)])
def test_results_are_within_the_bound_at_any_scale(design: str, form: str | None) -> None:
    problem = widened(make_problem(70, 104, 40, 17, HALF, **in_form(form, 17, 17), scale=0.3))
    with lookup.override_blocks(blocks_of(design, 16)):
        check_mixed(problem)


@pytest.mark.parametrize(
    ("design", "form"), [("tile", "folded"), ("two_launch", "frozen"), ("drawn", "folded"), ("algebra_first", "frozen")]
)
def test_dropout(design: str, form: str) -> None:
    # 1/(1 − p) is a power of two, so that it rounds nothing.
    problem = make_problem(37, 48, 80, 5, HALF, **in_form(form, 5, 3), dropout_p=0.5, scale=1.0, seed=5)
    with lookup.override_blocks(blocks_of(design, 16)):
        assert_as_rounded_before(widened(problem))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(("share", "form"), [(None, "folded"), (0.5, "folded"), (0.5, "frozen")])
def test_groups(share: float | None, form: str, dropout_p: float) -> None:
    options = {"share": share, "unselected": form, "scale": [1.0, 2.0, 0.5], "dropout_p": dropout_p}
    assert_as_rounded_before(widened(draw_grouped((9, 0, 22), 20, 24, 5, HALF, **options)))
    if share is None:
        check_mixed(widened(draw_grouped((9, 0, 22), 20, 24, 33, HALF, **options | {"scale": [0.3, 1.0, 7.0]})))


@pytest.mark.parametrize("joined", [True, False])
def test_projections_of_one_input(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not joined:
        for module in (projections_forward, projections_backward):
            monkeypatch.setattr(module, "are_joined", lambda *_: False)
    shape = (37, 48, (32, 16, 1), (5, 0, 40), (True, False, True), (False, False, True))
    problems = [replace(widened(problem), scale=2.0**p) for p, problem in enumerate(make_problems(shape, HALF))]

    def results(of: list[Problem]) -> tuple[list[Tensor], list[Tensor]]:
        operands, x = [operands_of(problem) for problem in of], of[0].x.clone().requires_grad_()
        ys = run_projections(x, operands)
        torch.autograd.backward(ys, [problem.dy for problem in of])
        gradients = [factor.grad for own in operands for factor in (own.lora_A, own.lora_B)]
        return [*(y.detach() for y in ys), x.grad], gradients

    own, gradients = results(problems)
    expected, of_rounded = results([rounded(problem) for problem in problems])
    assert_equal(own, expected)
    for one, other in zip(gradients, of_rounded, strict=True):
        assert_only_rounded(one, other)


@pytest.mark.parametrize(("design", "form"), [("tile", "frozen"), ("tile_two_launch", None), ("drawn", "frozen")])
def test_there_are_as_many_launches_as_before(design: str, form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    for module in LAUNCHING:
        note_calls(monkeypatch, module, "launch", lambda kernel, *rest, **named: kernel.fn.__name__, launches)
    counts = []
    with lookup.override_blocks(blocks_of(design, 16)):
        problem = widened(make_problem(70, 48, 80, 5, HALF, **in_form(form, 5, 3)))
        for one in (problem, rounded(problem)):
            launches.clear()
            run(one)
            counts.append(Counter(launches))
    assert counts[0] == counts[1]


def test_calls_of_one_shape_replay_their_own_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    found = note_calls(
        monkeypatch, adapted_matmul, "find_blocks", lambda kind, shape, *rest, wide_factors: wide_factors
    )
    for seed in range(3):
        problem = widened(make_problem(37, 50, 29, 5, HALF, scale=1.0, seed=seed))
        assert_as_rounded_before(problem)
    assert Counter(found) == {True: 2, False: 2}  # forward and dX, recorded once for each kind of factors


# ---------------------------------------------------------------------------------- the gradients as fp32 sums


def assert_fp32_sum(found: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Assert that `found` is s·leftᵀ·right in fp32: that no element is off by more than such a sum of its terms."""
    exact = scale * left.double().T @ right.double()
    size = abs(scale) * left.double().abs().T @ right.double().abs()
    assert found.dtype is torch.float32
    assert ((found.double() - exact).abs() <= 2 * torch.finfo(torch.float32).eps * left.shape[0] ** 0.5 * size).all()


@pytest.mark.parametrize("multiprocessors", [1, 8], ids=["whole", "parts"])
@pytest.mark.parametrize("form", [None, "folded", "frozen"])
def test_gradients_are_fp32_sums(form: str | None, multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "multiprocessors_of", lambda device: multiprocessors)
    problem = widened(make_problem(600, 48, 80, 5, HALF, scale=0.3))
    index = None if form is None else index_buffer((1, 4), torch.device(DEVICE))
    arguments = (problem.weight, problem.lora_A, problem.lora_B)
    _, s = linear.forward(problem.x, *arguments, None, index, 0.3, form == "frozen", True, 0.0, None)
    # Without dX and dB it is the launch of dS alone that dA is computed from, so that dS is known.
    options = (index, 0.3, form == "frozen", False)
    _, dA, _ = linear.backward(problem.dy, problem.x, *arguments, s, *options, True, False, 0.0, None)
    _, _, dB = linear.backward(problem.dy, problem.x, *arguments, s, *options, False, True, 0.0, None)
    ds = side_product.side_product(problem.dy, problem.lora_B, index=index if form == "folded" else None, dropout=None)
    assert s.dtype is ds.dtype is HALF
    chosen = slice(None) if form is None else [1, 4]
    columns = slice(0, 2) if form == "folded" else chosen
    assert_fp32_sum(dA[chosen], ds[:, columns], problem.x, 0.3)
    assert_fp32_sum(dB.T[chosen], s[:, columns], problem.dy, 0.3)
    if form is not None:
        assert not dA[[0, 2, 3]].any()
        assert not dB[:, [0, 2, 3]].any()


@pytest.mark.parametrize("multiprocessors", [1, 8], ids=["whole", "parts"])
@pytest.mark.parametrize("rows", [37, 600])
def test_db_from_one_read_of_dy_is_an_fp32_sum(
    rows: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "multiprocessors_of", lambda device: multiprocessors)
    problem, s = widened(make_problem(rows, 48, 80, 5, HALF)), torch.randn(rows, 5, device=DEVICE).to(HALF)
    dB = torch.full((80, 5), float("nan"), device=DEVICE)
    ds = output_gradient_(dB, problem.dy, problem.lora_B, s, index=None, out_index=None, scale=0.3)
    assert_fp32_sum(dB.T, s, problem.dy, 0.3)
    assert ds.dtype is HALF
    exact = problem.dy.double() @ problem.lora_B.to(HALF).double()
    torch.testing.assert_close(ds.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("multiprocessors", [1, 8], ids=["whole", "parts"])
def test_gradients_of_groups_are_fp32_sums(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "multiprocessors_of", lambda device: multiprocessors)
    bounds, scales = [0, 200, 200, 330], torch.tensor([0.3, 1.0, 7.0], device=DEVICE)
    thin, wide = (torch.randn(330, d, device=DEVICE).to(HALF) for d in (5, 40))
    found = torch.full((3, 5, 40), float("nan"), device=DEVICE)
    groups = Groups(torch.tensor(bounds, device=DEVICE), scales, 1.0)
    blocks = {"factor_gradient": GradientBlocks(16, 32, 16, 1, 4, 2)}
    with lookup.override_blocks(blocks):
        factor_gradient_(found, thin, wide, thin_index=None, out_index=None, scale=1.0, groups=groups)
    for group, scale in enumerate(scales.tolist()):
        part = slice(bounds[group], bounds[group + 1])
        assert_fp32_sum(found[group], thin[part], wide[part], scale)


@pytest.mark.parametrize("design", ALGEBRA_DESIGNS)
def test_where_torch_has_products_of_two_dtypes_they_give_the_gradients(
    design: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[tuple[torch.dtype, torch.dtype]] = []

    def on_device(left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        products.append((left.dtype, out_dtype))
        assert left.dtype is right.dtype
        return out.copy_(left.to(out_dtype) @ right.to(out_dtype))

    monkeypatch.setattr(torch, "mm", on_device)
    monkeypatch.setattr(linear, "multiplies_into_fp32", lambda device: True)
    problem = widened(make_problem(37, 48, 80, 5, HALF, scale=0.3))
    with lookup.override_blocks(blocks_of(design, 16)):
        check_mixed(problem)
    assert products == [(HALF, torch.float32)] * 2


# ------------------------------------------------------------------------------------------------------------ folds


@pytest.mark.parametrize("shape", [(1, 1, 1), (29, 50, 5), (80, 144, 33)], ids=str)
@pytest.mark.parametrize("kept", [[], [0]], ids=["all folded", "all but one"])
def test_folds_are_rounded_once(shape: tuple[int, int, int], kept: list[int]) -> None:
    n, k, rank = shape
    weight = torch.randn(n, k, device=DEVICE).to(HALF)
    lora_A, lora_B = torch.randn(rank, k, device=DEVICE), torch.randn(n, rank, device=DEVICE)
    rest = [module for module in range(rank) if module not in kept]
    given = (weight, lora_A[rest], lora_B[:, rest], -0.3)
    options = {"scale": 0.3, "sign": -1}
    folded = pk.fold(weight, lora_A, lora_B, kept, **options)
    assert folded.dtype is HALF
    assert_rounded_once(folded, *given)
    # Rounding the factors first would be seen.
    if rest and n > 1:
        with pytest.raises(AssertionError):
            assert_rounded_once(pk.fold(weight, lora_A.to(HALF), lora_B.to(HALF), kept, **options), *given)
    assert torch.equal(pk.fold_(weight.clone(), lora_A, lora_B, kept, **options), folded)


def test_many_folds_of_both_kinds_of_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    from plora_kernels.kernels import fold_many

    launches = note_calls(monkeypatch, fold_many, "_launch", len)
    jobs = []
    for seed, size in enumerate(((29, 50, 5), (80, 48, 33), (16, 32, 3), (7, 64, 5))):
        problem = widened(make_problem(1, size[1], size[0], size[2], HALF, seed=seed))
        for one in (problem, rounded(problem)):
            jobs.append(pk.Fold(one.weight.clone(), one.lora_A, one.lora_B, [1], 0.3))
    expected = [pk.fold(job.weight, job.lora_A, job.lora_B, job.selected, scale=job.scale) for job in jobs]
    assert_equal(pk.fold_many_(jobs), expected)
    # The aligned ones together, factors of each kind for themselves.
    assert launches == [3, 3]
    for job, one in zip(jobs[::2], expected[::2], strict=True):
        assert job.lora_A.dtype is torch.float32
        assert one.dtype is HALF


def test_stochastic_rounding_keeps_the_fp32_sum_on_average() -> None:
    weight = torch.ones(64, 128, device=DEVICE).to(HALF)
    # 1 + 2⁻¹³ lies an eighth of the way from 1 to the next number of float16.
    lora_A, lora_B = torch.ones(1, 128, device=DEVICE), torch.full((64, 1), 2.0**-13, device=DEVICE)
    results = [pk.fold(weight, lora_A, lora_B, [], rounding="stochastic", seed=seed) for seed in range(4)]
    up = torch.stack(results).double().sub(1).div(2.0**-10)
    assert set(up.unique().tolist()) == {0.0, 1.0}
    assert up.mean().item() == pytest.approx(0.125, abs=0.01)


def test_precision_of_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    from plora_kernels.kernels.fold import fold_precision
    from plora_kernels.tuning.blocks import Hardware

    half, single = torch.zeros(1, dtype=HALF), torch.zeros(1)
    found = {}
    for capability in (0, 75, 80, 90):
        monkeypatch.setattr(lookup, "hardware_of", lambda device, known=capability: Hardware(known, 1))
        found[capability] = [fold_precision(*pair) for pair in ((half, single), (half, half), (single, single))]
    mixed = {0: "ieee", 75: "ieee", 80: "tf32x3", 90: "tf32x3"}
    assert found == {capability: [own, "ieee", "ieee"] for capability, own in mixed.items()}


def test_blocks_of_a_table_that_fit_no_longer_get_fewer_stages() -> None:
    blocks = {"forward": MatmulBlocks("tile", 128, 256, 64, 64, 8, 8, 4)}
    problem = widened(make_problem(70, 48, 80, 33, HALF, scale=1.0))
    with lookup.override_blocks(blocks), lookup.record_blocks() as taken:
        run(problem)
        wide = taken["forward"]
        run(rounded(problem))
        assert taken["forward"] == blocks["forward"]
    assert wide == replace(blocks["forward"], num_stages=1, block_r=16)  # of 64 KiB, which the interpreter's device has
