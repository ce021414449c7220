"""The steps of docs/extending.md work: here a source of data, a provider of a benchmark and an operator are added.

A federated method is added in the page itself, whose snippet the tests run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.cases import Case, Problem, Projection
from bench.checks.correctness import WrongResultError
from bench.harness.timing import Plan
from bench.measure import measure
from bench.providers import linear as layers
from bench.providers.base import Maker, Provider, layer_provider, named_factors
from bench.providers.registry import MAKERS
from fed.config import RunConfig
from fed.data import federated_data, sources
from plora_kernels.dispatch import define
from tests.support.text_data import PETS, text_config
from tests.support.tiny_bert import make_tiny_bert


def provider_off_by(factor: float) -> Maker:
    """A layer as two products of plain torch, its result multiplied by `factor`."""

    def make(case: Case, problem: Problem) -> Provider:
        def call(x: Tensor) -> tuple[Tensor, ...]:
            low = functional.linear(functional.linear(x, problem.A), problem.B)
            return (factor * (functional.linear(x, problem.weight) + problem.scale * low),)

        return layer_provider(case, problem, call, named_factors([problem.A], [problem.B]))

    return make


def test_a_provider_is_a_function_and_a_line_and_is_checked_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("forward", Projection("tiny", "query", 50, 29), 37, 5, "float32")
    plan, cpu = Plan(seconds_per_provider=0.0, min_rounds=3), torch.device("cpu")
    makers = {name: layers.LAYER[name] for name in ("base", "peft")}
    monkeypatch.setitem(MAKERS, "forward", makers | {"by-hand": provider_off_by(1.0)})
    assert measure(case, cpu, plan).entry("by-hand")["rounds"] == 3
    monkeypatch.setitem(MAKERS, "forward", makers | {"by-hand": provider_off_by(1.001)})
    with pytest.raises(WrongResultError, match="by-hand"):
        measure(case, cpu, plan)


def test_a_source_is_a_branch_that_returns_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_bert(tmp_path / "bert", PETS, hidden=32, layers=1, labels=("cat", "dog"))
    rows = [{"text": f"a {animal} number {n}", "label": animal} for n in range(30) for animal in ("cat", "dog")]

    def read(config: RunConfig) -> sources.Rows:
        return sources.Rows(rows, [f"animal {number}" for number in range(len(rows))])

    monkeypatch.setattr(sources, "read", read)
    data = federated_data.load(text_config(tmp_path / "nowhere.jsonl", model))
    assert sum(map(len, data.clients)) + len(data.test) == len(rows)
    assert data.label_names == ("cat", "dog")
    del rows[7]["label"]
    with pytest.raises(sources.FedError, match=r"animal 7: data.label is 'label'; the columns there are text"):
        federated_data.load(text_config(tmp_path / "nowhere.jsonl", model))


def test_an_operator_of_a_layer_s_shape_is_a_forward_and_a_backward_over_rows() -> None:
    def forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        s = x @ A.T
        return x @ weight.T + rest[2] * s @ B.T, s  # bias, index, scale, …

    def backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: Tensor, *rest: Any) -> Any:
        scale, ds = rest[1], dy @ B  # index, scale, …
        return dy @ weight + scale * ds @ A, scale * ds.T @ x, scale * dy.T @ s

    call = define(
        "contributed", "Tensor? index", "Tensor? seed", forward, backward, lambda A, index, frozen: A.shape[0]
    )
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    A = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    B = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return call(x, weight, A, B, None, None, 0.5, False, True, 0.0, None)

    assert torch.autograd.gradcheck(layer, (x, A, B))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, A, B), x @ (weight + 0.5 * B @ A).T)
