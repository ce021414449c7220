"""The bounds that losses and gradients of whole models are held to, by hand."""

from __future__ import annotations

import pytest
import torch

from bench.checks.correctness import WrongResultError
from bench.models.correctness import Reference

EXACT = {"loss": torch.tensor(2.0).double(), "a": torch.tensor([3.0, 4.0]).double(), "b": torch.ones(2).double()}
PLAIN = {"loss": torch.tensor(2.0), "a": torch.tensor([3.0, 4.0005]), "b": torch.ones(2)}


def test_the_bound_of_all_gradients_is_twice_the_largest_error_of_plain_torch() -> None:
    reference = Reference(EXACT, PLAIN, torch.float32)
    assert reference.bounds == pytest.approx({"Frobenius": 2e-4, "max": 2.5e-4}, rel=1e-3)
    reference.check("near", {**PLAIN, "a": torch.tensor([3.0, 4.0009]), "b": torch.tensor([1.0001, 1.0])})
    with pytest.raises(WrongResultError, match=r"far: the gradient b is off by 0\.0003 in relative"):
        reference.check("far", {**PLAIN, "b": torch.tensor([1.0003, 1.0003])})
    exactly = {**PLAIN, "a": torch.tensor([3.0, 4.0])}
    assert Reference(EXACT, exactly, torch.bfloat16).bounds["max"] == 4 * 2.0**-7


def test_a_loss_may_be_off_by_the_roundings_of_the_model_s_dtype() -> None:
    off = {**PLAIN, "loss": torch.tensor(2.0 + 2e-5)}
    Reference(EXACT, PLAIN, torch.bfloat16).check("half", off)
    with pytest.raises(WrongResultError, match=r"full: loss is off by 2e-05"):
        Reference(EXACT, PLAIN, torch.float32).check("full", off)


@pytest.mark.parametrize(
    "changes",
    [
        {"a": torch.ones(3)},
        {"a": torch.tensor([3.0, float("nan")])},
        {"c": torch.ones(1)},
        {"loss": torch.tensor([2.0])},
    ],
)
def test_other_names_shapes_and_nan_are_wrong(changes: dict[str, torch.Tensor]) -> None:
    with pytest.raises(WrongResultError):
        Reference(EXACT, PLAIN, torch.float32).check("other", {**PLAIN, **changes})
    with pytest.raises(WrongResultError, match="gives no \\['b'\\], and nothing besides"):
        Reference(EXACT, PLAIN, torch.float32).check("less", {name: PLAIN[name] for name in ("loss", "a")})
