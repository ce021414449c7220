"""`plora_linear` under torch.compile, autocast and torch.func's transforms."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import plora_kernels as pk
from plora_kernels.functional import autocast_dtype
from tests.support.layer_inputs import GROUPS
from tests.support.layer_inputs import layer_inputs as inputs
from tests.support.models import adapted


def test_compile_traces_whole_models_and_selections_do_not_recompile() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 9))
    handle = adapted(model, ["0", "2"], rank=24)
    source = random.Random(0)
    for form in ("folded", "frozen"):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(50):
            handle.select(source.sample(range(24), 10), form)
            x = torch.randn(4, 20)
            y = compiled(x)
            torch.testing.assert_close(y, model(x))
            y.sum().backward()
        assert counter.frame_count == 1, form


def test_compile_checks_indices_on_the_device() -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    compiled = torch.compile(
        lambda selected: pk.plora_linear(x, weight, lora_A, lora_B, selected), backend="aot_eager", fullgraph=True
    )
    for wrong in ([-1, 0], [0, 4], [2, 2]):
        with pytest.raises(RuntimeError, match="selected must hold distinct modules from 0 to 3"):
            compiled(torch.tensor(wrong))


def test_compile_with_a_selection_as_argument_does_not_recompile() -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    counter = CompileCounterWithBackend("aot_eager")

    def run(selected: Tensor) -> Tensor:
        return pk.plora_linear(x, weight, lora_A, lora_B, selected)

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for _ in range(12):
        mask = torch.rand(4) > 0.5
        torch.testing.assert_close(compiled(mask), run(mask))
    assert counter.frame_count == 1
    for _ in range(12):
        indices = torch.randperm(4)[:2]
        torch.testing.assert_close(compiled(indices), run(indices))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    x, weight, lora_A, lora_B, bias = inputs()

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return pk.plora_linear(x.relu(), weight, lora_A, lora_B, bias=bias).tanh()

    expected, compiled = run(x, lora_A, lora_B), torch.compile(run, fullgraph=True)(x, lora_A, lora_B)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), (x, lora_A, lora_B)),
        torch.autograd.grad(expected.sum(), (x, lora_A, lora_B)),
    )


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("active", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_behaves_as_for_linear(dtype: torch.dtype, active: torch.dtype, groups: list[int] | None) -> None:
    x, weight, lora_A, lora_B, bias = (t.to(dtype).detach() for t in inputs(groups=groups))
    lora_A.requires_grad_()
    with torch.autocast("cpu", dtype=active):
        y = pk.plora_linear(x, weight, lora_A, lora_B, bias=bias, groups=groups)
        assert y.dtype == torch.nn.functional.linear(x, weight, bias).dtype
    y.sum().backward()
    assert lora_A.grad.dtype == dtype
    with torch.autocast("cpu", dtype=active, enabled=False):
        assert pk.plora_linear(x, weight, lora_A, lora_B, groups=groups).dtype == dtype


def test_a_kind_of_device_without_autocast_casts_nothing() -> None:
    x, weight, lora_A, lora_B, _ = (t.to("meta") for t in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype("meta") is None
        assert pk.plora_linear(x, weight, lora_A, lora_B).dtype is torch.float32
        assert autocast_dtype("cpu") is torch.bfloat16
    assert autocast_dtype("cpu") is None


def test_autocast_takes_mixed_dtypes() -> None:
    x, weight, lora_A, lora_B, _ = inputs(requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pk.plora_linear(x.bfloat16(), weight, lora_A, lora_B)
    assert y.dtype is torch.bfloat16


@pytest.mark.usefixtures("without_group_weights")
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one", "groups"])
def test_double_backward_and_transforms_say_so(groups: list[int] | None) -> None:
    x, weight, lora_A, lora_B, _ = inputs(groups=groups)

    def run(x: Tensor) -> Tensor:
        return pk.plora_linear(x, weight, lora_A, lora_B, groups=groups).sum()

    (gradient,) = torch.autograd.grad(run(x), lora_A, create_graph=True)
    with pytest.raises(pk.UnsupportedError, match="no double backward"):
        gradient.sum().backward()
    transforms = [torch.func.grad(run), lambda x: torch.func.jvp(run, (x,), (x,))]
    for transform in transforms + [torch.vmap(run)] * (groups is None):
        with pytest.raises(pk.UnsupportedError, match=r"does not run under torch\.func transforms"):
            transform(x.detach())
