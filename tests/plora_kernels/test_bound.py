"""The bound of `tests/support/numerics.py`: it predicts errors, and finds paths that were made wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from plora_kernels.fallback import linear as fallback
from tests.plora_kernels.ops.test_numerics import TORCH_DTYPES
from tests.support import numerics
from tests.support.numerics import NAMES, Problem, Product, Rounded, errors, in_form, run, running_sum

ROWS, K, N, RANK = 65, 130, 100, 16
make_problem = partial(numerics.make_problem, device="cpu")


def too_far(results: tuple[Tensor | None, ...], problem: Problem) -> set[str]:
    """Return the names of the results that are not within the bound of what the problem asks for."""
    held = zip(NAMES, results, problem.reference_results(torch.float64), problem.variances(), strict=True)
    return {
        name
        for name, result, exact, variance in held
        if result is not None
        and any(not error <= allowed for error, allowed in errors(result, exact, variance).values())
    }


@pytest.mark.parametrize("rows", [1, 16, 65])
@pytest.mark.parametrize("terms", [1, 2, 17, 257])
def test_the_expected_error_is_that_of_one_running_sum(rows: int, terms: int) -> None:
    """Sums done term by term, the same on every machine, have errors of the predicted size."""
    generator = torch.Generator().manual_seed(terms)
    start, left, right = (torch.randn(s, generator=generator).float() for s in ((rows, 40), (rows, terms), (terms, 40)))
    total = start.clone()
    for one, other in zip(left.unbind(1), right, strict=True):
        total += one[:, None] * other  # rounded, then added
    exact = start.double() + left.double() @ right.double()
    variance = running_sum(start, [Product(Rounded.of(left), right)]).variance
    error, expected = (total.double() - exact).norm().item(), variance.sum().sqrt().item()
    spread = 5 / (2 * start.numel()) ** 0.5  # five standard deviations of a norm of that many numbers
    assert abs(error / expected - 1) < spread
    for error, allowed in errors(total, exact, variance).values():
        assert error <= allowed


def test_rounding_to_half_is_expected_where_numbers_are_kept() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.randn(1000, 50)
        error = (values.to(dtype).double() - values.double()).norm().item()
        expected = Rounded.of(values).to(dtype).variance.sum().sqrt().item()
        assert error == pytest.approx(expected, rel=0.05)
    assert Rounded.of(torch.zeros(2, 2)).to(torch.float16).variance.sum() == 0


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", [None, "folded", "frozen"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_plain_torch_is_within_the_bound(dtype: torch.dtype, form: str | None, p: float) -> None:
    options = in_form(form, RANK, seed=1, device="cpu")
    problem = make_problem(ROWS, K, N, RANK, dtype, **options, dropout_p=p, scale=0.7, seed=1)
    plain = problem.reference_results(dtype)
    assert too_far(plain, problem) == set()
    if dtype.itemsize < 4:  # a library's fp32 sums may be much better than running ones
        exact = problem.reference_results(torch.float64)
        further = tuple(truth + 3 * (one.double() - truth) for one, truth in zip(plain, exact, strict=True))
        assert {"y", "dx"} <= too_far(further, problem)


def in_half(product: Tensor) -> Tensor:
    """Return the tensor rounded to half precision and back."""
    return product.to(torch.float16).to(product.dtype)


def summed_in_bfloat16(rows: Tensor, down: Tensor) -> Tensor:
    """Return rows · down, summed in bfloat16."""
    total = rows.new_zeros(rows.shape[0], down.shape[1], dtype=torch.bfloat16)
    for one, other in zip(rows.float().unbind(1), down.float(), strict=True):
        total = (total.float() + one[:, None] * other).to(torch.bfloat16)
    return total.to(rows.dtype)


def without_a_feature(problem: Problem) -> Problem:
    x = problem.x.clone()
    x[:, x.shape[1] // 2] = 0
    return replace(problem, x=x)


def with_a_module_off(by: float) -> Callable[[Problem], Problem]:
    def change(problem: Problem) -> Problem:
        lora_B = problem.lora_B.clone()
        lora_B[:, 3] *= 1 + by
        return replace(problem, lora_B=lora_B)

    return change


def without_the_factor_of_dropout(problem: Problem) -> Problem:
    return replace(problem, scale=problem.scale * (1 - problem.dropout_p))


EVERY = {"y", "dx", "dA", "dB"}
# The fault; where it is in the torch path, or in the inputs; the wrong function; the results it changes.
WRONG: dict[str, tuple[str | None, Callable, set[str]]] = {
    "the low-rank part in half": ("scaled_product", lambda real, *operands: in_half(real(*operands)), EVERY),
    "S and dS in half": ("_side_product", lambda real, *operands: in_half(real(*operands)), EVERY),
    "S and dS summed in bfloat16": ("_side_product", lambda real, *o: summed_in_bfloat16(*o[:2]), EVERY),
    "a feature left out": (None, without_a_feature, {"y", "dA", "dB"}),
    "a module's scale off by 1e-5": (None, with_a_module_off(1e-5), {"y", "dx", "dA"}),
    "a module's scale off by 1e-3": (None, with_a_module_off(1e-3), {"y", "dx", "dA"}),
    "a module's scale off by 5e-2": (None, with_a_module_off(5e-2), {"y", "dx", "dA"}),
    "dropout without its factor": (None, without_the_factor_of_dropout, EVERY),
}
# In half precision the other faults are no larger than rounding.
SEEN_IN_HALF = (
    "S and dS summed in bfloat16",
    "a feature left out",
    "a module's scale off by 5e-2",
    "dropout without its factor",
)


@pytest.mark.parametrize("size", [(ROWS, K, N, RANK), (33, 7, 15, 5), (300, 64, 64, 40)], ids=str)
@pytest.mark.parametrize("what", WRONG)
def test_paths_made_wrong_are_not_within_the_bound(
    what: str, size: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_is_found(what, make_problem(*size, torch.float32, dropout_p=0.3, bias=False, seed=1), monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", SEEN_IN_HALF)
def test_half_precision_made_wrong_is_not_within_the_bound(
    what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_is_found(what, make_problem(ROWS, K, N, RANK, dtype, dropout_p=0.3, bias=False, seed=1), monkeypatch)


def check_is_found(what: str, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the torch path unchanged and made wrong, and check which results of the latter are refused."""
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    assert too_far(run(problem), problem) == set()
    place, change, reached = WRONG[what]
    if place is None:
        problem_as_run = change(problem)
    else:
        problem_as_run, real = problem, getattr(fallback, place)
        monkeypatch.setattr(fallback, place, lambda *operands: change(real, *operands))
    assert too_far(run(problem_as_run), problem) == reached


@pytest.mark.parametrize("name", NAMES[:4])
def test_one_wrong_element_is_not_within_the_bound(name: str) -> None:
    problem = make_problem(ROWS, K, N, RANK, torch.float32, seed=1)
    results = list(problem.reference_results(torch.float32))
    place = NAMES.index(name)
    results[place] = results[place].clone()
    results[place][3, 2] += 2e-5
    assert too_far(tuple(results), problem) == {name}
