"""Intervals of paired differences, against values computed by hand."""

from __future__ import annotations

import pytest

from fed.report.comparison import interval


def test_five_differences_by_hand() -> None:
    # mean 3, s = √2.5, t(0.975, 4) = 2.7764451: half = 2.7764451 · √2.5 / √5 = 1.9632432
    found = interval([1, 2, 3, 4, 5])
    assert (found.mean, found.n) == (3, 5)
    assert (found.low, found.high) == pytest.approx((3 - 1.9632432, 3 + 1.9632432))
    assert found.verdict == "above"


def test_two_differences_take_a_wide_interval() -> None:
    # t(0.975, 1) = 12.7062047, s = √0.5, half = 12.7062047 · √0.5 / √2 = 6.3531024
    found = interval([1.0, 2.0])
    assert (found.low, found.high) == pytest.approx((1.5 - 6.3531024, 1.5 + 6.3531024))
    assert found.verdict == "tie"


def test_the_order_of_seeds_and_the_sign_do_what_they_should() -> None:
    found, turned = interval([0.1, -0.4, 2.0]), interval([-2.0, 0.4, -0.1])
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert interval([-1.0, -1.1, -0.9]).verdict == "below"


@pytest.mark.parametrize(("differences", "verdict"), [([0.0, 0.0], "tie"), ([0.5, 0.5], "above"), ([3.0], "one seed")])
def test_what_does_not_vary_and_what_stands_alone(differences: list[float], verdict: str) -> None:
    found = interval(differences)
    assert found.verdict == verdict
    assert (found.low is None) == (len(differences) == 1)
