"""Inside `Injected.disable` the model computes as its base, bit for bit, and is afterwards what it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import plora_kernels as pk
from tests.support.adapter_folders import INPUTS, Small, assert_unchanged, saved_by_peft, snapshot
from tests.support.models import adapted, tiny_llama
from tests.support.quantized import Linear8bitLt, stand_in
from tests.support.tiers import slow

TOKENS = torch.arange(24).reshape(2, 12)
SELECTIONS = [None, ([0, 3], "folded"), ([], "folded"), (list(range(4)), "folded"), ([2], "frozen"), ([], "frozen")]


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits.detach()


@pytest.mark.parametrize("select", SELECTIONS, ids=str)
@pytest.mark.parametrize("original", ["device", *slow("host")])
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)])
def test_it_is_the_base_bit_for_bit(select: tuple | None, original: str, dtype: torch.dtype, each_backend: str) -> None:
    base = tiny_llama().to(dtype)
    expected = logits(base)
    handle = adapted(copy.deepcopy(base), "all-linear", original=original)
    if select is not None:
        handle.select(*select)
    here, before, trained = logits(handle.model), snapshot(handle.model), list(handle.model.parameters())
    assert not torch.equal(here, expected)
    with handle.disable():
        assert torch.equal(logits(handle.model), expected)
        assert_unchanged(handle.model, before)  # so is what a state dict holds
    assert torch.equal(logits(handle.model), here)
    assert list(map(id, handle.model.parameters())) == list(map(id, trained))
    assert_unchanged(handle.model, before)


def test_training_mode_has_no_dropout_and_x_its_gradient() -> None:
    base, model = Small().train(), Small().train()
    handle = adapted(model, ["proj", "lin"], dropout=0.5)
    handle.select([1])
    x, y = INPUTS.clone().requires_grad_(), INPUTS.clone().requires_grad_()
    base(x).square().sum().backward()
    with handle.disable():
        model(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert all(p.grad is None for p in model.parameters())


def test_a_graph_made_before_runs_backward_afterwards() -> None:
    # As in preference optimisation: the policy's forward, then the reference's, then the policy's backward.
    for original in ("device", "host"):
        handle = adapted(Small(), ["proj", "lin"], original=original)
        handle.select([0, 2])
        x = INPUTS.clone().requires_grad_()
        expected = torch.autograd.grad(handle.model(x).square().sum(), [x, handle.model.proj.lora_A])
        loss = handle.model(x).square().sum()
        with handle.disable(), torch.no_grad():
            handle.model(x)
        found = torch.autograd.grad(loss, [x, handle.model.proj.lora_A])
        assert all(map(torch.equal, found, expected))


def test_contexts_nest_and_end_on_errors() -> None:
    handle = adapted(Small(), ["proj", "lin"])
    here, base = handle.model(INPUTS), Small()(INPUTS)
    with handle.disable():
        with handle.disable():
            assert torch.equal(handle.model(INPUTS), base)
        assert torch.equal(handle.model(INPUTS), base)
    assert torch.equal(handle.model(INPUTS), here)

    def failing() -> None:
        with handle.disable():
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        failing()
    assert torch.equal(handle.model(INPUTS), here)


def test_what_is_done_inside_holds_afterwards() -> None:
    handle, base = adapted(Small(), ["proj", "lin"]), Small()(INPUTS)
    twin = copy.deepcopy(handle)
    with handle.disable():
        handle.select([1, 3])
        assert torch.equal(handle.model(INPUTS), base)
    twin.select([1, 3])
    assert torch.equal(handle.model(INPUTS), twin.model(INPUTS))
    with handle.disable():
        handle.unfold()
        assert torch.equal(handle.model(INPUTS), base)
        handle.restore()
    assert torch.equal(handle.model(INPUTS), base)
    with pytest.raises(pk.StateError, match="taken out by"), handle.disable():
        pass


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_made_inside_are_enabled(copied: Callable[[nn.Module], nn.Module]) -> None:
    handle = adapted(Small(), ["proj", "lin"])
    here = handle.model(INPUTS)
    with handle.disable():
        twin = copied(handle.model)
    assert torch.equal(twin(INPUTS), here)


def test_groups_are_disabled_too() -> None:
    handle = adapted(Small(), ["proj"], rank=2)
    groups = {"proj": pk.GroupModules.of(pk.RowGroups([1, 2]), torch.randn(2, 2, 8), torch.randn(2, 8, 2))}
    base = Small()(INPUTS)
    with handle.grouped(groups):
        here = handle.model(INPUTS)
        with handle.disable():
            assert torch.equal(handle.model(INPUTS), base)
        assert torch.equal(handle.model(INPUTS), here)
    with handle.disable(), handle.grouped(groups):
        assert torch.equal(handle.model(INPUTS), base)


def test_fused_projections_compute_alone() -> None:
    base = tiny_llama()
    expected = logits(base)
    handle = adapted(base, ["q_proj", "k_proj", "v_proj"], fuse_projections=True)
    here = logits(base)
    with handle.disable():
        assert torch.equal(logits(base), expected)
    assert torch.equal(logits(base), here)


def test_a_compiled_model_is_disabled_too() -> None:
    handle = adapted(Small(), ["proj", "lin"])
    handle.select([1])
    model = torch.compile(handle.model, backend="aot_eager")
    here = model(INPUTS)
    with handle.disable():
        assert torch.equal(model(INPUTS), Small()(INPUTS))
    assert torch.equal(model(INPUTS), here)


def test_moving_and_casting_keep_it() -> None:
    for original in ("device", "host"):
        handle = adapted(Small(), ["proj", "lin"], original=original)
        handle.select([0])
        handle.model.double()
        with handle.disable():
            assert torch.equal(handle.model(INPUTS.double()), Small().double()(INPUTS.double()))


def test_a_quantised_layer_computes_with_its_dequantised_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    for rows in (3, 40):
        quantized = Linear8bitLt(24, 20)
        state = {key: value.clone() for key, value in quantized.state_dict().items()}
        handle = pk.inject(nn.Sequential(quantized), pk.PLoRAConfig(rank=2, target_modules=["0"]))
        x = torch.randn(rows, 24, requires_grad=True)
        expected = handle.model(x).detach()  # B is zero
        nn.init.ones_(handle.layers["0"].lora_B)
        assert not torch.equal(handle.model(x), expected)
        with handle.disable():
            y = handle.model(x)
            assert torch.equal(y, expected)
            assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0
        handle.restore()
        assert all(torch.equal(value, state[key]) for key, value in quantized.state_dict().items())


def test_modules_trained_whole_are_named(tmp_path: Path) -> None:
    trained = pk.inject(Small(), pk.PLoRAConfig(rank=2, target_modules=["proj"], modules_to_save=["head"]))
    loaded = pk.load_peft(Small(), saved_by_peft(tmp_path, modules_to_save=["head"]))
    for handle in (trained, loaded):
        with pytest.raises(pk.StateError, match="cannot compute as its base: head"), handle.disable():
            pass
        with torch.no_grad():
            nn.init.ones_(handle.layers["proj"].lora_B)
        here = handle.model(INPUTS)
        with handle.disable(with_saved_modules=True):
            base = Small()
            base.head.load_state_dict(handle.model.head.state_dict())
            assert torch.equal(handle.model(INPUTS), base(INPUTS))
        assert torch.equal(handle.model(INPUTS), here)
