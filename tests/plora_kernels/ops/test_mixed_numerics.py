"""fp32 factors over half precision: results and gradients no further from float64 than PEFT's, in the same cases."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from plora_kernels.ops import projections
from plora_kernels.ops.projections import JointGradient, Projection
from plora_kernels.selection import index_from_mask
from tests.support.equality import assert_equal
from tests.support.groups import GroupedProblem, draw_grouped
from tests.support.numerics import NAMES, Problem, differentiated, in_form, make_problem, run

HALF = [torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (37, 50, 29, 5), (65, 130, 100, 16), (300, 520, 260, 40)]


@pytest.fixture(autouse=True)
def on_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")


def over_half(problem: Problem, dtype: torch.dtype) -> Problem:
    """Return an fp32 problem with everything but the factors in `dtype`."""
    bias = None if problem.bias is None else problem.bias.to(dtype)
    x, weight, dy = (tensor.to(dtype) for tensor in (problem.x, problem.weight, problem.dy))
    return replace(problem, x=x, weight=weight, dy=dy, bias=bias)


def mixed_problem(
    shape: tuple[int, ...], dtype: torch.dtype, form: str | None, p: float = 0.0, seed: int = 0
) -> Problem:
    options = in_form(form, shape[3], seed, "cpu")
    return over_half(make_problem(*shape, torch.float32, dropout_p=p, seed=seed, device="cpu", **options), dtype)


def as_peft(problem: Problem, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """Return y as PEFT computes it: the base in half precision, x cast to fp32 for the adapter, the sum cast back."""
    y, wide = functional.linear(x, problem.weight, bias), x.float()
    drop = problem._dropout(torch.float32)
    mask = torch.ones(A.shape[0], dtype=torch.bool) if problem.mask is None else problem.mask
    dropped = wide if drop is None else wide * drop
    total = y + functional.linear(functional.linear(dropped, A[mask]), B[:, mask]) * problem.scale
    if problem.unselected == "frozen" and not mask.all():
        A, B = A[~mask].detach(), B[:, ~mask].detach()
        total = total + functional.linear(functional.linear(wide, A), B) * problem.scale
    return total.to(y.dtype)


def by_peft(problem: Problem, autocast: bool = False) -> tuple[Tensor | None, ...]:
    """Return y, dx, dA, dB, dbias as PEFT computes them, by its default or under autocast."""
    dtype = problem.x.dtype
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        return differentiated(problem, lambda x, *AB, bias: as_peft(problem, x, *AB, bias))


def assert_as_good(
    name: str, dtype: torch.dtype, result: Tensor, exact: Tensor, default: Tensor, autocast: Tensor | None = None
) -> None:
    """Assert that an error is at most twice that of PEFT's default, or within what half precision leaves of a sum.

    PEFT's default computes dA and dB in fp32 throughout, to 1e-7; here factors, S and dS are rounded to half precision.
    The floor is 4·eps·max|exact| in both norms; the Frobenius norm of many numbers has a second one, eps/2·‖exact‖_F,
    as if each were rounded once. PEFT under autocast makes the same roundings and rounds dA and dB besides, so where
    there are many numbers, which luck does not decide, theirs may not be the smaller error.
    """
    eps = torch.finfo(dtype).eps
    floor = 4 * eps * exact.abs().max().item()
    for norm, order, least in (("Frobenius", 2, max(floor, eps / 2 * exact.norm().item())), ("max", torch.inf, floor)):
        error, theirs = (torch.linalg.vector_norm(one.double() - exact, order).item() for one in (result, default))
        assert error <= max(2 * theirs, least), f"{name}: {norm} error {error:.3g}, PEFT's {theirs:.3g}"
    if autocast is not None and name in ("dA", "dB") and exact.numel() >= 500:
        error, theirs = ((one.double() - exact).norm().item() for one in (result, autocast))
        assert error <= theirs, f"{name}: error {error:.3g}, PEFT's under autocast {theirs:.3g}"


def check(problem: Problem) -> None:
    exact = problem.reference_results(torch.float64)
    held = zip(NAMES, run(problem), exact, by_peft(problem), by_peft(problem, autocast=True), strict=True)
    for name, result, truth, default, autocast in held:
        if result is not None and default is not None:
            assert_as_good(name, problem.x.dtype, result, truth, default, autocast)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", [None, "folded", "frozen"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_layer_is_as_good_as_pefts_default(
    dtype: torch.dtype, shape: tuple[int, ...], form: str | None, p: float
) -> None:
    check(mixed_problem(shape, dtype, form, p))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_adapter_that_cancels_the_base_is_no_worse_than_in_peft_under_autocast(
    dtype: torch.dtype, share: float
) -> None:
    # y and dx are small differences of large numbers, or the adapter's part alone: the roundings of A, B and S show,
    # which PEFT's default does not make, and its error is up to 2.6 times smaller.
    problem = mixed_problem((65, 130, 100, 16), dtype, None)
    weight = (-share * problem.scale * problem.lora_B @ problem.lora_A).to(dtype)
    problem = replace(problem, weight=weight, bias=None)
    exact = problem.reference_results(torch.float64)
    held = zip(NAMES[:4], run(problem), exact, by_peft(problem), by_peft(problem, autocast=True), strict=False)
    for name, result, truth, default, autocast in held:
        error, of_default, of_autocast = ((one.double() - truth).norm().item() for one in (result, default, autocast))
        # Of the adapter's part alone they make the same roundings.
        assert error <= 1.05 * of_autocast, f"{name}: {error:.3g}, PEFT's under autocast {of_autocast:.3g}"
        assert name in ("dA", "dB") or error <= 2.7 * of_default, f"{name}: {error:.3g}, PEFT's {of_default:.3g}"


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_groups_are_as_good_as_pefts_default(dtype: torch.dtype, share: float | None, p: float) -> None:
    drawn = draw_grouped(
        (40, 0, 7, 33), 96, 70, 12, torch.float32, share=share, unselected="frozen", dropout_p=p,
        scale=0.5 if share else [0.3, 0.7, 1.1, 0.9], device="cpu",
    )  # fmt: skip
    problem = GroupedProblem([over_half(one, dtype) for one in drawn.problems], drawn.scale)
    y, dx, dA, dB, _ = run(problem)
    exact = problem.reference_results(torch.float64)
    y_peft, dx_peft, dA_peft, dB_peft, _ = zip(*map(by_peft, problem.problems), strict=True)
    assert_as_good("y", dtype, y, exact[0], torch.cat(y_peft))
    assert_as_good("dx", dtype, dx, exact[1], torch.cat(dx_peft))
    assert_as_good("dA", dtype, dA, exact[2], torch.stack(dA_peft))
    assert_as_good("dB", dtype, dB, exact[3], torch.stack(dB_peft))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_projections_are_as_good_as_pefts_default(dtype: torch.dtype, frozen: bool) -> None:
    form = "frozen" if frozen else None
    problems = [mixed_problem((65, 130, n, 16), dtype, form, seed=p) for p, n in enumerate((100, 36, 52))]
    problems = [replace(problem, x=problems[0].x) for problem in problems]
    operands = [
        Projection(
            problem.weight, problem.lora_A.clone().requires_grad_(), problem.lora_B.clone().requires_grad_(),
            problem.bias, problem.scale, None if problem.mask is None else index_from_mask(problem.mask),
        )
        for problem in problems
    ]  # fmt: skip
    x = problems[0].x.clone().requires_grad_()
    joint = JointGradient(x.shape)
    computed = projections.forward(x, operands, keep_s=True)
    ys = [projections.attach(x, o, c, joint) for o, c in zip(operands, computed, strict=True)]
    torch.autograd.backward(ys, [problem.dy for problem in problems])
    sums: list[Tensor] = []
    for problem, own, y in zip(problems, operands, ys, strict=True):
        exact, default = problem.reference_results(torch.float64), by_peft(problem)
        autocast = by_peft(problem, autocast=True)
        for name, result, place in (("y", y.detach(), 0), ("dA", own.lora_A.grad, 2), ("dB", own.lora_B.grad, 3)):
            assert_as_good(name, dtype, result, exact[place], default[place], autocast[place])
        # As autograd adds dX of PEFT's layers.
        sums = [exact[1], default[1]] if not sums else [sums[0] + exact[1], sums[1] + default[1]]
    assert_as_good("dx", dtype, x.grad, *sums)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_default_held_against_is_that_of_peft_itself(dtype: torch.dtype, autocast: bool) -> None:
    problem = mixed_problem((37, 50, 29, 5), dtype, None)
    linear = nn.Linear(50, 29, dtype=dtype)
    linear.weight.data, linear.bias.data = problem.weight, problem.bias
    config = LoraConfig(r=5, lora_alpha=5 * problem.scale, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.dtype is B.dtype is torch.float32
    A.data, B.data = problem.lora_A.clone(), problem.lora_B.clone()
    x = problem.x.clone().requires_grad_()
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        y = layer(x)
    y.backward(problem.dy)
    assert_equal((y.detach(), x.grad, A.grad, B.grad), by_peft(problem, autocast)[:4])
