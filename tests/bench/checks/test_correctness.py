"""The check of results before timing: which it accepts and which it refuses."""

import pytest
import torch

from bench.cases import Case, Op, Problem, Projection
from bench.checks.correctness import WrongResultError, check, plain_results

# y = x Wᵀ + 2 (x Aᵀ) Bᵀ = [1·1 + 2·3, 2·1 + 2·3] + 2·([1·1 + 2·1] · [1, -1]) = [7 + 6, 8 - 6]
BY_HAND = Problem(
    x=torch.tensor([[1.0, 2.0]]),
    weight=torch.tensor([[1.0, 3.0], [2.0, 3.0]]),
    A=torch.tensor([[1.0, 1.0]]),
    B=torch.tensor([[1.0], [-1.0]]),
    grad_y=torch.tensor([[1.0, 1.0]]),
    scale=2.0,
)


def case(op: Op) -> Case:
    return Case(op, Projection("tiny", "by-hand", 2, 2), 1, 1, "float32")


def test_forward_by_hand() -> None:
    assert plain_results(case("forward"), BY_HAND, torch.float64, adapted=True)["y"].tolist() == [[13.0, 2.0]]
    assert plain_results(case("forward"), BY_HAND, torch.float64, adapted=False)["y"].tolist() == [[7.0, 8.0]]


def test_gradients_by_hand() -> None:
    results = plain_results(case("forward_backward"), BY_HAND, torch.float64, adapted=True)
    # dY B = 1 - 1 = 0, so the adapter adds nothing to dx, and dA = s (dY B)ᵀ x is 0; dB = s dYᵀ (x Aᵀ).
    assert results["dx"].tolist() == [[3.0, 6.0]]
    assert results["dA"].tolist() == [[0.0, 0.0]]
    assert results["dB"].tolist() == [[6.0], [6.0]]


def test_fold_by_hand() -> None:
    assert plain_results(case("fold"), BY_HAND, torch.float64, adapted=True)["weight"].tolist() == [[3, 5], [0, 1]]


def test_the_problem_is_left_alone() -> None:
    before = BY_HAND.x.clone()
    plain_results(case("forward_backward"), BY_HAND, torch.float32, adapted=True)
    assert torch.equal(BY_HAND.x, before)
    assert not BY_HAND.x.requires_grad
    assert BY_HAND.x.grad is None


def test_an_error_within_twice_the_plain_error_passes() -> None:
    exact = {"y": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    plain = {"y": torch.tensor([1.0 + 1e-3, 2.0])}
    check("fused", {"y": torch.tensor([1.0 - 1.9e-3, 2.0])}, exact, plain)
    with pytest.raises(WrongResultError, match=r"fused: y is off by 0\.0021 in max norm"):
        check("fused", {"y": torch.tensor([1.0 - 2.1e-3, 2.0])}, exact, plain)


def test_the_frobenius_norm_is_bounded_too() -> None:
    exact = {"y": torch.zeros(100, dtype=torch.float64)}
    plain = {"y": torch.cat([torch.tensor([1e-3]), torch.zeros(99)])}
    with pytest.raises(WrongResultError, match="Frobenius"):
        check("fused", {"y": torch.full((100,), 1e-3)}, exact, plain)


def test_the_floor_is_four_eps_of_the_largest_value() -> None:
    exact = {"y": torch.tensor([100.0], dtype=torch.float64)}
    plain = {"y": torch.tensor([100.0])}
    check("fused", {"y": torch.tensor([100.0 + 3e-5])}, exact, plain)  # 4·eps·100 = 4.8e-5
    with pytest.raises(WrongResultError, match="bound"):
        check("fused", {"y": torch.tensor([100.0 + 6e-5])}, exact, plain)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(wrong: float) -> None:
    exact = {"y": torch.tensor([1.0], dtype=torch.float64)}
    with pytest.raises(WrongResultError):
        check("fused", {"y": torch.tensor([wrong])}, exact, {"y": torch.tensor([1.0])})


def test_a_missing_gradient_is_wrong() -> None:
    results = plain_results(case("forward_backward"), BY_HAND, torch.float32, adapted=True)
    exact = plain_results(case("forward_backward"), BY_HAND, torch.float64, adapted=True)
    without = {name: value for name, value in results.items() if name != "dA"}
    with pytest.raises(WrongResultError, match="dA"):
        check("fused", without, exact, results)
