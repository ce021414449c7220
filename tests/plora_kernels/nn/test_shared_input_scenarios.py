"""Layers that read the same tensor give the results of layers alone, whatever else happens to the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import plora_kernels as pk
from tests.support.attention import gradients, make


def change_the_tensor(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    h = x.detach().clone()
    first = q(h).detach()
    h.add_(1.0)
    return [first, k(h), v(h)]


def leave_one_out(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    h = x * 2
    return [q(h), v(h), *[layer(x) for layer in (q, k, v)]]


def change_the_grad_mode(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        first = q(x)
    return [first, k(x), v(x)]


def leave_the_grad_mode(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    first = q(x)
    with torch.no_grad():
        second = k(x)
    return [first, second, v(x)]


def select_in_between(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    first = q(x)
    k.select([1])
    v.select([0, 1], "frozen")
    return [first, k(x), v(x)]


def train_in_between(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    first = q(x)
    with torch.no_grad():
        k.lora_B.mul_(2.0)
        v.bias.add_(1.0)
    v.scale = 0.25
    return [first, k(x), v(x)]


def replace_data_in_between(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    first = q(x)
    k.lora_A.data = k.lora_A.data * 3
    v.weight = nn.Parameter(v.weight.detach() * 2, requires_grad=False)
    return [first, k(x), v(x)]


def stop_training_in_between(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    k.requires_grad_(False)
    first = q(x)
    k.lora_B.requires_grad_(True)
    v.requires_grad_(False)
    return [first, k(x), v(x)]


def cast_in_between(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    first = q(x)
    k.float()
    return [first, k(x.float()).double(), v(x)]


def run_without_watching(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        h = x * 2
        first = q(h)
        h += 1
        results = [first, k(h), v(h)]
    return [result.clone() for result in results]


def detach_in_between(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    h = x * 2
    first = q(h)
    h.detach_()
    return [first, k(h), v(h.requires_grad_())]


def watch_with_hooks(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    handles = [
        k.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,)),
        q.register_full_backward_hook(lambda module, d_in, d_out: (d_in[0] * 3,)),
        v.register_forward_hook(lambda module, arguments, y: y + 1),
    ]
    results = [q(x), k(x), v(x)]
    for handle in handles:
        handle.remove()
    return results


def swap_parameters(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    first = q(x)
    other = torch.func.functional_call(k, {"lora_B": k.lora_B.detach() * 2}, (x,))
    return [first, other, k(x), v(x)]


def checkpointed(reentrant: bool) -> Callable[..., list[Tensor]]:
    def act(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
        def block(h: Tensor) -> Tensor:
            return torch.cat([q(h).sin(), k(h).cos(), v(h)], -1)

        return [checkpoint(block, x * 2, use_reentrant=reentrant), checkpoint(block, x, use_reentrant=reentrant)]

    return act


def autocast_with_nothing_to_cast(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    layers, h = [layer.bfloat16() for layer in (q, k, v)], x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [layer(h) for layer in layers]


def autocast_in_between(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    (q, k, v), h = [layer.float() for layer in (q, k, v)], x.float()
    first = q(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = k(h)
    return [first, second, v(h)]


SIMPLE = {
    "call on another tensor": lambda q, k, v, x: [q(x), k(x + 1), v(x)],
    "call one twice": lambda q, k, v, x: [q(x), q(x), k(x), v(x), k(x)],
    "begin with the last": lambda q, k, v, x: [v(x), k(x), q(x)],
}
OTHERS = (
    *(change_the_tensor, leave_one_out, change_the_grad_mode, leave_the_grad_mode, select_in_between),
    *(train_in_between, replace_data_in_between, stop_training_in_between, cast_in_between),
    *(run_without_watching, detach_in_between, watch_with_hooks, swap_parameters),
)
SCENARIOS = SIMPLE | {scenario.__name__: scenario for scenario in OTHERS}


def play(scenario: Callable[..., list[Tensor]], fused: bool, times: int = 1, needs_x: bool = True) -> list[Tensor]:
    """Return a scenario's results and gradients on new layers, run repeatedly on the same ones."""
    model, _ = make(fused)
    x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_(needs_x)
    outputs = []
    for _ in range(times):
        results = scenario(model.q_proj, model.k_proj, model.v_proj, x)
        outputs += [result.detach() for result in results]
        differentiable = [result.double().square().sum() for result in results if result.requires_grad]
        if differentiable:
            sum(differentiable).backward()  # type: ignore[union-attr]
    return [*outputs, *([] if x.grad is None else [x.grad]), *gradients(model)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_happens_the_results_are_those_of_layers_alone(name: str) -> None:
    torch.testing.assert_close(play(SCENARIOS[name], True), play(SCENARIOS[name], False))


@pytest.mark.parametrize("scenario", [autocast_with_nothing_to_cast, autocast_in_between], ids=lambda s: s.__name__)
def test_autocast(scenario: Callable[..., list[Tensor]]) -> None:
    # Without dX, which the joint backward rounds once instead of three times.
    torch.testing.assert_close(play(scenario, True, needs_x=False), play(scenario, False, needs_x=False))


@pytest.mark.parametrize("name", ["leave_one_out", "call one twice", "call on another tensor", "watch_with_hooks"])
def test_and_so_they_are_when_it_happens_again_and_again(name: str) -> None:
    torch.testing.assert_close(play(SCENARIOS[name], True, 6), play(SCENARIOS[name], False, 6))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool, launches: list[int]) -> None:
    fused, separate = (play(checkpointed(reentrant), f, 3) for f in (True, False))
    torch.testing.assert_close(fused, separate)
    assert launches == [3] * 12  # two blocks, forward and recomputation, three times


def test_a_layer_alone_and_in_a_group_saves_the_same_for_the_backward() -> None:
    # Layers may stop or start sharing before the recomputation, and checkpointing compares the saved tensors of both.
    saved = []
    for fused in (True, False):
        model, handle = make(fused)
        handle.layers["v_proj"].select([1, 2], "frozen")
        shapes: list[tuple[int, ...]] = []
        x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, to=shapes: (to.append(tuple(t.shape)), t)[1], lambda t: t
        ):
            model(x)
        saved.append(shapes)
    assert saved[0] == saved[1]


def test_compiled_models_run_their_layers_alone(launches: list[int]) -> None:
    model, handle = make(True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for modules in ([0], [1], [0]):
        handle.select(modules)
        x = torch.randn(4, 7, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1
    assert launches == [3, 3, 3]  # by the uncompiled model


def test_transforms_are_refused_by_name() -> None:
    model, _ = make(True)
    with pytest.raises(pk.UnsupportedError, match=r"does not run under torch\.func transforms"):
        torch.vmap(model)(torch.randn(2, 3, 7, dtype=torch.float64))


def test_errors_are_those_of_the_layer() -> None:
    model, _ = make(True)
    with pytest.raises(pk.ShapeError, match=r"x is \(2, 6\); weight \(N=6, K=7\) needs \(…, 7\)"):
        model(torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(pk.DTypeError, match=r"weight is torch\.float64, x is torch\.float32"):
        model(torch.randn(2, 7))
    model.v_proj.weight.requires_grad_()
    with pytest.raises(pk.StateError, match="the base is frozen"):
        model(torch.randn(2, 7, dtype=torch.float64))


def test_empty_input() -> None:
    model, _ = make(True)
    x = torch.randn(0, 7, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert not any(g.any() for g in gradients(model))
