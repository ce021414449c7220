"""Siblings that read one tensor: fused where they do, right where they do not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import plora_kernels as pk
from plora_kernels import shared_input
from tests.support.models import tiny_bert, tiny_llama

TOKENS = torch.arange(24).reshape(2, 12)


class Attention(nn.Module):
    """Three projections of different widths, as of grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(7, 6), nn.Linear(7, 3, bias=False), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x).square().sum(-1) + self.k_proj(x).sin().sum(-1) * self.v_proj(x).sum(-1)


NAMES = ("q_proj", "k_proj", "v_proj")


def make(fused: bool, dtype: torch.dtype = torch.float64) -> tuple[Attention, pk.Injected]:
    """Return the projections with adapters of their own ranks and scales; the same each time, fused or not."""
    torch.manual_seed(0)
    model = Attention().to(dtype)
    config = pk.PLoRAConfig(
        rank=4,
        alpha=3.0,
        target_modules=NAMES,
        rank_pattern={"k_proj": 2, "v_proj": 5},
        alpha_pattern={"v_proj": 8.0},
        fuse_projections=fused,
    )
    handle = pk.inject(model, config)
    for layer in handle.layers.values():
        nn.init.normal_(layer.lora_B)
    return model, handle


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of projections of every joint forward."""
    counts: list[int] = []
    real = shared_input.forward

    def counted(x: Tensor, operands: list, keep_s: bool) -> list:
        counts.append(len(operands))
        return real(x, operands, keep_s)

    monkeypatch.setattr(shared_input, "forward", counted)
    return counts


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(fused: list[Tensor], separate: list[Tensor]) -> None:
    assert len(fused) == len(separate)
    for a, b in zip(fused, separate, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("form", ["all", "folded", "frozen"])
@pytest.mark.parametrize(
    ("build", "targets", "groups"),
    [
        (tiny_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], 4),
        (tiny_bert, ["query", "key", "value"], 2),
        (tiny_bert, ["query", "value"], 2),
    ],
    ids=["llama", "bert", "bert-qv"],
)
def test_models_compute_and_train_as_without(
    build: Callable[[], nn.Module], targets: list[str], groups: int, form: str, launches: list[int]
) -> None:
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = build().double()
        handle = pk.inject(model, pk.PLoRAConfig(rank=4, target_modules=targets, fuse_projections=fused))
        assert len(handle.projections) == (groups if fused else 0)
        for layer in handle.layers.values():
            nn.init.normal_(layer.lora_B, std=0.3)
        if form != "all":
            handle.select([0, 2], form)
        steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings).logits
            steps.zero_grad()
            logits.square().mean().backward()
            steps.step()
        results.append([logits.detach(), embeddings.grad, *gradients(model)])
    assert_same(*results)
    assert len(launches) == 2 * groups


def test_a_model_on_the_kernels(kernels: None, launches: list[int]) -> None:
    results = []
    for fused in (True, False):
        model, handle = make(fused, torch.float32)
        handle.select([1], "frozen")
        x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(x).sum().backward()
        results.append([x.grad, *gradients(model)])
    assert_same(*results)
    assert launches == [3]


def test_groups_are_those_that_fit_together() -> None:
    handle = pk.inject(
        tiny_llama(), pk.PLoRAConfig(target_modules=["q_proj", "v_proj", "up_proj"], fuse_projections=True)
    )
    prefix = "model.layers.{}.self_attn."
    assert handle.projections == tuple((f"{prefix}q_proj".format(i), f"{prefix}v_proj".format(i)) for i in range(2))
    model = Attention()
    model.k_proj = nn.Linear(8, 3)  # another input size: it reads something else
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=NAMES, fuse_projections=True))
    assert handle.projections == (("q_proj", "v_proj"),)
    assert type(handle.layers["k_proj"]) is pk.FusedPLoRALinear
    model = tiny_llama()
    model.model.layers[0].self_attn.k_proj.double()
    config = pk.PLoRAConfig(rank=2, target_modules="model.layers.0.*[qk]_proj", fuse_projections=True)
    assert pk.inject(model, config).projections == ()


def test_every_layer_keeps_a_selection_of_its_own(launches: list[int]) -> None:
    results = []
    for fused in (True, False):
        model, handle = make(fused)
        handle.layers["q_proj"].select([3, 1], "folded")
        handle.layers["k_proj"].select([], "folded")
        handle.layers["v_proj"].select([0, 2, 4], "frozen")
        x = torch.ones(3, 7, dtype=torch.float64, requires_grad=True)
        model(x).sum().backward()
        assert handle.layers["k_proj"].lora_A.grad is None
        results.append([x.grad, *gradients(model)])
        handle.unfold()
        results[-1].append(model(x.detach()))
    assert_same(*results)
    assert launches == [3, 3]


# --------------------------------------------------------------------------------------- what else may happen


def call_on_another_tensor(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    return [q(x), k(x + 1), v(x)]


def change_the_tensor(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    h = x.detach().clone()
    first = q(h).detach()
    h.add_(1.0)
    return [first, k(h), v(h)]


def leave_one_out(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    h = x * 2
    return [q(h), v(h), *[layer(x) for layer in (q, k, v)]]


def call_one_twice(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    return [q(x), q(x), k(x), v(x), k(x)]


def begin_with_the_last(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> list[Tensor]:
    return [v(x), k(x), q(x)]


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


SCENARIOS = (
    call_on_another_tensor,
    change_the_tensor,
    leave_one_out,
    call_one_twice,
    begin_with_the_last,
    change_the_grad_mode,
    leave_the_grad_mode,
    select_in_between,
    train_in_between,
    replace_data_in_between,
    stop_training_in_between,
    cast_in_between,
    run_without_watching,
    detach_in_between,
    watch_with_hooks,
    swap_parameters,
)


def play(scenario: Callable[..., list[Tensor]], fused: bool, times: int = 1, needs_x: bool = True) -> list[Tensor]:
    """Return a scenario's results and gradients on fresh layers, over again on the same ones."""
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


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_whatever_happens_the_results_are_those_of_layers_alone(scenario: Callable[..., list[Tensor]]) -> None:
    assert_same(play(scenario, True), play(scenario, False))


@pytest.mark.parametrize("scenario", [autocast_with_nothing_to_cast, autocast_in_between], ids=lambda s: s.__name__)
def test_autocast(scenario: Callable[..., list[Tensor]]) -> None:
    # Without dX, which is rounded once instead of three times.
    assert_same(play(scenario, True, needs_x=False), play(scenario, False, needs_x=False))


@pytest.mark.parametrize(
    "scenario", [leave_one_out, call_one_twice, call_on_another_tensor, watch_with_hooks], ids=lambda s: s.__name__
)
def test_and_so_they_are_when_it_happens_again_and_again(scenario: Callable[..., list[Tensor]]) -> None:
    assert_same(play(scenario, True, 6), play(scenario, False, 6))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool, launches: list[int]) -> None:
    fused, separate = (play(checkpointed(reentrant), f, 3) for f in (True, False))
    assert_same(fused, separate)
    assert launches == [3] * 12  # two blocks, forward and recomputation, three times


def test_a_layer_alone_and_in_a_group_saves_the_same_for_the_backward() -> None:
    # A recomputation may find the layers parted, or the other way round: checkpointing counts what is saved.
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
    assert launches == [3, 3, 3]  # of the model that is not compiled


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


# ------------------------------------------------------------------------------------- lifetime, parting, copies


def test_outputs_nobody_takes_live_no_longer_than_the_input() -> None:
    model, _ = make(True)
    x = torch.randn(3, 7, dtype=torch.float64)
    model.q_proj(x)
    waiting = [weakref.ref(waiting.computed.y) for waiting in model.q_proj.shared._round._waiting.values()]
    assert [w() is not None for w in waiting] == [True, True]
    del x
    assert [w() for w in waiting] == [None, None]


def test_no_graph_outlives_its_step() -> None:
    model, _ = make(True)
    h = torch.randn(3, 7, dtype=torch.float64, requires_grad=True) * 2
    gc.disable()  # what only the collector would free counts as kept
    try:
        y = model.q_proj(h)
        nodes = [weakref.ref(y.grad_fn)]
        y = y.sum() + model.k_proj(h).sum() + model.v_proj(h).sum()
        nodes.append(weakref.ref(h))
        y.backward()
        del y, h
        assert [node() for node in nodes] == [None, None]
        h = torch.randn(3, 7, dtype=torch.float64, requires_grad=True) * 2
        y = model.q_proj(h)  # the others are not called
        held = weakref.ref(h)
        del y, h
        assert held() is None
    finally:
        gc.enable()


def test_layers_that_do_not_share_their_input_part(launches: list[int]) -> None:
    model, _ = make(True)
    for _ in range(6):
        x = torch.randn(3, 7, dtype=torch.float64)
        call_on_another_tensor(model.q_proj, model.k_proj, model.v_proj, x)
    assert len(launches) == shared_input.MISSES_ALLOWED


def test_a_round_that_is_completed_forgives_those_that_were_not(launches: list[int]) -> None:
    model, _ = make(True)
    for _ in range(4):
        model.q_proj(torch.randn(3, 7, dtype=torch.float64))
        model.q_proj(torch.randn(3, 7, dtype=torch.float64))
        model(torch.randn(3, 7, dtype=torch.float64))
    assert len(launches) == 12


def test_layers_that_drop_run_alone(launches: list[int]) -> None:
    model, handle = make(fused=True)
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    for layer in handle.layers.values():
        layer.dropout, layer.dropout_seed = 0.5, 3
    model(x)
    assert launches == []
    model.eval()(x)
    assert launches == [3]


def test_copies_form_groups_of_their_own(launches: list[int]) -> None:
    model, handle = make(True)
    handle.select([0], "frozen")
    x = torch.randn(3, 7, dtype=torch.float64)
    model.q_proj(x)  # a round is open
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        launches.clear()
        torch.testing.assert_close(copied(x), expected)
        assert launches == [3]
        assert copied.q_proj.shared is copied.v_proj.shared is not model.q_proj.shared
        with torch.no_grad():
            copied.k_proj.lora_B.zero_()
        assert torch.equal(model(x), expected)


def test_a_layer_copied_by_itself_copies_no_other_and_runs_alone(launches: list[int]) -> None:
    model, _ = make(True)
    x = torch.randn(3, 7, dtype=torch.float64)
    copied = copy.deepcopy(model.q_proj)
    torch.testing.assert_close(copied(x), model.q_proj(x))
    assert launches == [3]
    assert copied.shared._members[1] is None


def test_moving_the_model_forgets_an_open_round() -> None:
    model, _ = make(True)
    x = torch.randn(3, 7, dtype=torch.float64)
    model.q_proj(x)
    model.float()
    torch.testing.assert_close(model(x.float()).double(), make(False)[0](x), rtol=1e-4, atol=1e-4)


def test_states_files_and_restoring_are_as_without(tmp_path: Path) -> None:
    plain = tiny_bert()
    original = {name: value.clone() for name, value in plain.state_dict().items()}
    config = pk.PLoRAConfig(rank=4, target_modules=["query", "key", "value"], fuse_projections=True)
    model, twin = copy.deepcopy(plain), copy.deepcopy(plain)
    handle = pk.inject(model, config)
    assert list(model.state_dict()) == list(
        pk.inject(twin, pk.PLoRAConfig(4, target_modules=["query", "key", "value"])).model.state_dict()
    )
    for layer in handle.layers.values():
        nn.init.normal_(layer.lora_B)
    expected = model(input_ids=TOKENS).logits
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(input_ids=TOKENS).logits, expected)
    model.save_pretrained(tmp_path / "model")  # safetensors refuses tensors that share memory
    pk.save_peft(handle, tmp_path / "adapter")
    loaded = pk.load_peft(copy.deepcopy(plain), tmp_path / "adapter").model
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, expected)
    restored = handle.restore()
    assert all(type(restored.get_submodule(name)) is nn.Linear for name in handle.layers)
    for name, value in restored.state_dict().items():
        assert torch.equal(value, original[name]), name
