"""`plora_linear` under torch.compile, autocast and torch.func's transforms."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import plora_kernels as pk
from plora_kernels.dispatch import autocast_dtype
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


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Run the test with no versions of a function from other tests, of which torch allows eight, and leave none."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_other_numbers_of_modules_compile_three_times_where_parameters_may_be_dynamic(form: str) -> None:
    # As docs/drop-in.md says: a first number, one for all others from 2 on, and one for a single module.
    layer = pk.FusedPLoRALinear(20, 9, rank=24)
    torch.nn.init.normal_(layer.lora_B)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(layer, backend=counter, fullgraph=True), torch.randn(4, 20)
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        for size in (2, 3, 1, 7, 5, 2, 16, 9, 1, 4, 11):
            layer.select(range(size), form)
            y = compiled(x)
            torch.testing.assert_close(y, layer(x))
            y.sum().backward()
    assert counter.frame_count == 3


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("fuse", [False, True], ids=["alone", "projections"])
@pytest.mark.parametrize("form", [None, "folded", "frozen"])
def test_a_traced_model_can_be_saved_and_loaded(form: str | None, fuse: bool, tmp_path: Path) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) * self.k_proj(x)

    model = Attention()
    config = pk.PLoRAConfig(rank=4, target_modules=["q_proj", "k_proj"], fuse_projections=fuse)
    handle = pk.inject(model, config)
    for layer in handle.layers.values():
        torch.nn.init.normal_(layer.lora_B)
    if form is not None:
        handle.select([1, 3], form)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            traced = torch.jit.trace(model, torch.randn(2, 8))
        torch.jit.save(traced, tmp_path / "model.pt")
        loaded, x = torch.jit.load(tmp_path / "model.pt"), torch.randn(3, 5, 8)
        y = loaded(x)
        assert torch.equal(y, model(x))
        y.square().sum().backward()
        model(x).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in loaded.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(gradients[name], parameter.grad)
        model.zero_grad()


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
