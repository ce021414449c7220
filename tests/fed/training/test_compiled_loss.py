"""A compiled loss is compared with the plain one before it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fed.training.compiled_loss import COMPARED_STEPS, CompiledLosses, _difference
from fed.training.losses import client_losses
from tests.support.equality import assert_equal
from tests.support.notes import note_calls

SIZES = [3, 2]


class Model(nn.Module):
    """Two clients' own linear layers over one batch."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 3, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(2, 3, generator=generator) * 1e-2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        parts = [inputs[:3] @ self.weight[0].T + self.bias[0], inputs[3:] @ self.weight[1].T + self.bias[1]]
        return SimpleNamespace(logits=self.dropout(torch.cat(parts)))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(5, 4, generator=generator), "labels": torch.tensor([0, 2, 1, 1, 0])}


def gradients_of(model: nn.Module) -> Callable[[Tensor], Mapping[str, Tensor]]:
    named = dict(model.named_parameters())
    return lambda loss: dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))


By = Callable[..., CompiledLosses]


@pytest.fixture
def compile_by(monkeypatch: pytest.MonkeyPatch) -> By:
    """Replace inductor by another compiler."""
    torch.compiler.reset()

    def make(backend: Any, on_event: Callable[[str], object] = pytest.fail) -> CompiledLosses:
        monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: backend)
        return CompiledLosses(on_event)

    return make


def right(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    return graph.forward


def changing(change: Callable[[Tensor], Tensor]) -> Any:
    """Return a compiler that changes what a graph computes."""
    return lambda graph, inputs: (
        lambda *values: [change(value) if value.is_floating_point() else value for value in graph(*values)]
    )


class SecondClientsBias(torch.autograd.Function):
    """Returns (b, 3) logits unchanged, and changes the gradient of the second client's rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:3], gradient[3:] * 1.05]) if gradient.shape == (5, 3) else gradient


def raising(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    raise IndexError("no compiler\nfor miles")


# torch ignores this warning itself where a graph breaks, as it does at this model's namespace.
class TestCompiledLosses:
    def test_what_is_right_is_compared_for_some_steps_and_used(
        self, batch: dict[str, Tensor], compile_by: By, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, compared = Model(), note_calls(monkeypatch, CompiledLosses, "_compare", lambda *operands: 1)
        compiled = compile_by(right)
        for _ in range(COMPARED_STEPS + 2):
            found = compiled(model, batch, SIZES, gradients_of(model))
            torch.testing.assert_close(found, client_losses(model, batch, SIZES))
        assert len(compared) == COMPARED_STEPS

    @pytest.mark.parametrize(
        ("backend", "said"),
        [
            (
                changing(lambda value: value * 1.01),
                r"the compiled step is wrong: loss of client 0 .* is off by \S+ \(.*\)",
            ),
            (changing(lambda value: value * torch.nan), r"the compiled step is wrong: loss of client 0 .*"),
            (
                changing(lambda value: SecondClientsBias.apply(value)),
                r"the compiled step is wrong: weight of client 1 of the cohort is off by 5\.0e-02 \(0.001 is allowed\)",
            ),
            (raising, r"torch cannot compile the cohort's step \(no compiler\)"),
        ],
        ids=["off", "nan", "one gradient", "raising"],
    )
    def test_what_is_not_right_gives_way_to_plain_steps(
        self, batch: dict[str, Tensor], compile_by: By, backend: Any, said: str
    ) -> None:
        model, lines = Model(), list[str]()
        compiled = compile_by(backend, lines.append)
        for _ in range(3):
            found = compiled(model, batch, SIZES, gradients_of(model))
            assert torch.equal(found, client_losses(model, batch, SIZES))
        (line,) = lines
        assert re.fullmatch(rf"{said}; steps are taken uncompiled", line), line

    @pytest.mark.parametrize(
        ("dtype", "off", "said"),
        [
            (torch.bfloat16, 1.0014, None),  # as a compiler that keeps float32 between operators has it
            (torch.bfloat16, 1.2, r"loss of client 0 of the cohort is off by 2\.0e-01 \(0\.09375 is allowed\)"),
            (torch.float16, 1.0014, None),
            (torch.float16, 1.05, r"loss of client 0 of the cohort is off by 5\.0e-02 \(0\.0117188 is allowed\)"),
            (torch.float32, 1.0014, r"loss of client 0 of the cohort is off by 1\.4e-03 \(0\.001 is allowed\)"),
        ],
        ids=str,
    )
    def test_a_loss_is_held_to_the_dtype_of_the_model_it_was_computed_in(
        self, batch: dict[str, Tensor], compile_by: By, dtype: torch.dtype, off: float,
        said: str | None,
    ) -> None:  # fmt: skip
        model, lines = Model().to(dtype), list[str]()
        batch["inputs"] = batch["inputs"].to(dtype)
        compiled = compile_by(
            changing(lambda value: value * off if value.dim() == 1 and value.dtype is torch.float32 else value),
            lines.append,
        )
        found = compiled(model, batch, SIZES, gradients_of(model))
        assert found.dtype is torch.float32
        if said is None:
            assert not lines
        else:
            assert re.fullmatch(rf"the compiled step is wrong: {said}; steps are taken uncompiled", lines[0]), lines

    def test_what_goes_wrong_later_is_found(self, batch: dict[str, Tensor], compile_by: By) -> None:
        """An error in a factor of B does not show while B is zero, only later."""
        calls, lines, model = list[int](), list[str](), Model()

        def late(value: Tensor) -> Tensor:
            calls.append(1)
            return value if len(calls) < 5 else value * 1.01

        compiled = compile_by(changing(late), lines.append)
        for _ in range(3):
            compiled(model, batch, SIZES, gradients_of(model))
        assert len(lines) == 1

    def test_a_client_whose_loss_is_not_finite_does_not_hide_another(
        self, batch: dict[str, Tensor], compile_by: By
    ) -> None:
        batch["inputs"][0, 0], model, lines = torch.nan, Model(), list[str]()
        compiled = compile_by(right)
        for _ in range(2):
            assert torch.equal(
                compiled(model, batch, SIZES, gradients_of(model)).isfinite(), torch.tensor([False, True])
            )
        compiled = compile_by(changing(lambda value: SecondClientsBias.apply(value)), lines.append)
        compiled(model, batch, SIZES, gradients_of(model))
        assert "weight of client 1" in lines[0]

    def test_a_model_that_draws_goes_unchecked_and_draws_as_if_never_looked_at(
        self, batch: dict[str, Tensor], compile_by: By
    ) -> None:
        model, lines = Model(dropout=0.5), list[str]()
        compiled, found = compile_by(right, lines.append), []
        for _ in range(3):  # new, and no longer new
            torch.manual_seed(1)
            found.append([compiled(model, batch, SIZES, gradients_of(model)) for _ in range(2)])
        assert_equal(found[1:], [found[0]] * 2)
        assert not torch.equal(*found[0])
        assert lines == ["the model draws numbers (dropout of its own): compiled steps go unchecked"]

    def test_an_error_of_the_step_itself_is_no_fault_of_the_compiler(
        self, batch: dict[str, Tensor], compile_by: By
    ) -> None:
        model = Model()
        compiled = compile_by(right)
        for _ in range(COMPARED_STEPS):
            compiled(model, batch, SIZES, gradients_of(model))
        compiled._to_compare = 1

        def failing(loss: Tensor) -> Mapping[str, Tensor]:
            raise RuntimeError("the step's own")

        with pytest.raises(RuntimeError, match="the step's own"):
            compiled(model, batch, SIZES, failing)


def test_matrices_may_lie_column_by_column() -> None:
    """Compiled steps take column-major A, as cohorts keep it from `fed.training.cohort.WIDE` features on."""
    expected = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).mT
    assert _difference({"A": expected.clone()}, {"A": expected}) is None
    found = expected.clone()
    found[1] *= 1.01
    assert (
        _difference({"A": found}, {"A": expected}) == "A of client 1 of the cohort is off by 1.0e-02 (0.001 is allowed)"
    )
