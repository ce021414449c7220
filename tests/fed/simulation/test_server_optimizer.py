"""The server's optimiser."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fed.simulation.server_optimizer import step
from fed.types import Adapter, ServerState

ADAM = SimpleNamespace(optimizer="fedadam", step_size=0.1, beta1=0.9, beta2=0.99, tau=1e-3)


def state(a: list[float], b: list[float]) -> ServerState:
    return ServerState(Adapter({"m": (torch.tensor(a)[:, None], torch.tensor(b)[None])}, 1.0))


def test_averaging_takes_what_the_method_made() -> None:
    following = state([2.0], [3.0])
    assert step(state([1.0], [1.0]), following, SimpleNamespace(optimizer="fedavg")) is following


def test_two_steps_of_adam_by_hand() -> None:
    """Δ = 1 then 2: m = 0.1, 0.29; v = 0.01, 0.0499; x += 0.1 m / (√v + 0.001)."""
    first = step(state([1.0], [0.0]), state([2.0], [0.0]), ADAM)
    x = 1 + 0.1 * 0.1 / (0.1 + 1e-3)
    assert first.adapter.factors["m"][0].item() == pytest.approx(x, rel=1e-6)
    mean = replace(
        first, adapter=replace(first.adapter, factors={"m": (first.adapter.factors["m"][0] + 2, torch.zeros(1, 1))})
    )
    second = step(first, mean, ADAM)
    assert second.adapter.factors["m"][0].item() == pytest.approx(x + 0.1 * 0.29 / (0.0499**0.5 + 1e-3), rel=1e-6)
    assert second.moments["first A m"].item() == pytest.approx(0.29)


def test_a_module_nobody_moved_keeps_its_value_and_its_moments() -> None:
    first = step(state([1.0, 5.0], [1.0, 1.0]), state([2.0, 6.0], [2.0, 1.0]), ADAM)
    A, B = first.adapter.factors["m"]
    only_first = replace(first, adapter=replace(first.adapter, factors={"m": (A + torch.tensor([[1.0], [0.0]]), B)}))
    second = step(first, only_first, ADAM)
    assert second.adapter.factors["m"][0][0] != A[0]
    assert torch.equal(second.adapter.factors["m"][0][1], A[1])
    assert torch.equal(second.adapter.factors["m"][1], B)
    assert second.moments["first A m"][1] == first.moments["first A m"][1]
    assert B[0, 1] == 1.0
