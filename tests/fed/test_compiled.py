"""What torch compiles is held against plain steps before it is used."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fed.compiled import CompiledLosses
from fed.losses import client_losses

SIZES = [3, 2]


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 3), nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.dropout(self.linear(inputs)))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"inputs": torch.randn(5, 4), "labels": torch.tensor([0, 2, 1, 1, 0])}


def gradients_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda loss: torch.cat([own.flatten() for own in torch.autograd.grad(loss, [*model.parameters()])])


@pytest.fixture
def compile_by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CompiledLosses]:
    """Let something else stand in for inductor."""
    torch.compiler.reset()

    def make(backend: Any, on_event: Callable[[str], object] = pytest.fail) -> CompiledLosses:
        monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: backend)
        return CompiledLosses(on_event)

    return make


def right(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    return graph.forward


def wrong(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    return lambda *values: [1.01 * value if value.is_floating_point() else value for value in graph(*values)]


def raising(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    raise RuntimeError("no compiler\nfor miles")


# torch hides this one from everybody else where a graph breaks, as it does at this model's namespace.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
class TestCompiledLosses:
    def test_what_is_right_is_compared_once_and_used(
        self, batch: dict[str, Tensor], compile_by: Callable[..., CompiledLosses], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, compared, compare = Model(), [], CompiledLosses._compare
        monkeypatch.setattr(CompiledLosses, "_compare", lambda *operands: compared.append(1) or compare(*operands))
        compiled = compile_by(right)
        for _ in range(3):
            found = compiled(model, batch, SIZES, gradients_of(model))
            torch.testing.assert_close(found, client_losses(model, batch, SIZES))
        assert len(compared) == 1

    @pytest.mark.parametrize(
        ("backend", "said"),
        [
            (wrong, r"the gradients of the compiled step are off by \d\.\de-02 of their norm \(0.001 is allowed\)"),
            (raising, r"torch cannot compile the cohort's step \(no compiler\)"),
        ],
    )
    def test_what_is_not_right_gives_way_to_plain_steps(
        self, batch: dict[str, Tensor], compile_by: Callable[..., CompiledLosses], backend: Any, said: str
    ) -> None:
        model, lines = Model(), list[str]()
        compiled = compile_by(backend, lines.append)
        for _ in range(3):
            found = compiled(model, batch, SIZES, gradients_of(model))
            assert torch.equal(found, client_losses(model, batch, SIZES))
        (line,) = lines
        assert re.fullmatch(rf"{said}; steps are taken uncompiled", line)

    def test_a_model_that_draws_is_not_compared_and_draws_as_if_never_checked(
        self, batch: dict[str, Tensor], compile_by: Callable[..., CompiledLosses]
    ) -> None:
        model = Model(dropout=0.5)
        compiled, found = compile_by(right), []
        for _ in range(2):  # new, and no longer new
            torch.manual_seed(1)
            found.append([compiled(model, batch, SIZES, gradients_of(model)) for _ in range(2)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(*found[0])

    def test_an_error_of_the_model_itself_is_no_fault_of_the_compiler(
        self, batch: dict[str, Tensor], compile_by: Callable[..., CompiledLosses]
    ) -> None:
        model = Model()
        compiled = compile_by(right)
        compiled(model, batch, SIZES, gradients_of(model))
        batch["labels"][0] = 7
        with pytest.raises((IndexError, RuntimeError)):
            compiled(model, batch, SIZES, gradients_of(model))
