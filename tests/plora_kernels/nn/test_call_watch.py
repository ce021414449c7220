"""Adapted layers that the first complete forward pass does not call are named once, and nothing else changes."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import plora_kernels as pk
from tests.support.models import tiny_bert

NAMES = ["first", "second", "idle"]


class Partly(nn.Module):
    """Two layers that run and one that never does, and with `short` only one that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, short: bool = False, encoder_outputs: Tensor | None = None) -> Tensor:
        y = self.first(x)
        return y if short else self.second(y)


def make(names: list[str] = NAMES) -> tuple[Partly, pk.Injected]:
    model = Partly()
    return model, pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=names))


def notices(run: Callable[[], object]) -> list[str]:
    """Return the warnings of this package that `run` gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if issubclass(warning.category, pk.PLoRAWarning)]


X = torch.ones(2, 4)


def test_layers_that_were_not_called_are_named_once() -> None:
    model, _ = make()
    (message,) = notices(lambda: model(X))
    assert message.startswith("the first forward pass did not call these adapted layers: idle; ")
    assert "\n" not in message
    assert notices(lambda: model(X, short=True)) == []


def test_the_notice_points_at_the_call_of_the_model() -> None:
    model, _ = make()
    with pytest.warns(pk.PLoRAWarning, match="idle") as said:
        model(X)
    assert said[0].filename == __file__


def test_numbered_layers_are_named_together() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Module())
    model[1].parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    model[1].forward = lambda x: x
    pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=r"0|1\.parts\.\d"))
    (message,) = notices(lambda: model(X))
    assert "layers: *.parts.* (3); " in message


def test_nothing_is_said_of_layers_that_were_called() -> None:
    model, handle = make(["first", "second"])
    assert notices(lambda: model(X)) == []
    bert = tiny_bert()
    pk.inject(bert, pk.PLoRAConfig(rank=2, target_modules="all-linear"))
    assert notices(lambda: bert(input_ids=torch.ones(1, 3, dtype=torch.long))) == []
    handle.restore()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_pass_that_fails_or_gets_the_encoders_outputs_is_not_the_first() -> None:
    model, _ = make(["first", "second"])
    with pytest.raises(pk.ShapeError):
        model(torch.ones(2, 3))
    assert notices(lambda: model(X, short=True, encoder_outputs=X)) == []
    assert notices(lambda: model(X)) == []
    assert not any(layer._forward_pre_hooks for layer in model.children())


def test_restoring_ends_the_watch() -> None:
    model, handle = make()
    handle.restore()
    assert notices(lambda: model(X)) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_and_saved_models_watch_themselves() -> None:
    model, _ = make()
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for one in (copied, loaded, model):
        assert len(notices(lambda one=one: one(X))) == 1
        assert not any(layer._forward_pre_hooks for layer in one.children())


def test_compiled_and_exported_models_are_as_without_it() -> None:
    model, _ = make()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert notices(lambda: compiled(X)) == []
    assert len(notices(lambda: model(X))) == 1
    torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 1
    model, _ = make()
    for strict in (False, True):
        assert notices(lambda strict=strict: torch.export.export(model, (X,), strict=strict)) == []
