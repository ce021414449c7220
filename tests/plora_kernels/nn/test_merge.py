"""Merging the adapter of a whole model: the plain model with the weights that PEFT's merge_and_unload gives."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

import plora_kernels as pk
from tests.support.adapter_folders import INPUTS, Small, assert_unchanged, saved_by_peft, snapshot
from tests.support.architectures import stir
from tests.support.equality import assert_equal
from tests.support.models import adapted, tiny_bert, tiny_llama
from tests.support.quantized import Linear8bitLt, stand_in

TOKENS = torch.arange(24).reshape(2, 12)
EPS = torch.finfo(torch.float32).eps


def stirred(base: nn.Module, **options: object) -> pk.Injected:
    """Adapt a copy of the base, with random values in all that is trained."""
    options = {"rank": 5, "alpha": 7.0, "target_modules": ["q_proj", "down_proj"], **options}
    handle = pk.inject(copy.deepcopy(base), pk.PLoRAConfig(**options))
    stir(handle.model)
    return handle


@pytest.mark.parametrize("select", [None, ([0, 3], "folded"), ([], "folded"), ([2], "frozen")], ids=str)
@pytest.mark.parametrize("original", ["device", "host"])
def test_it_is_pefts_merged_model(tmp_path: Path, select: tuple | None, original: str) -> None:
    base = tiny_llama()
    plain = {name: type(module) for name, module in base.named_modules()}
    handle = stirred(base, original=original, rank_pattern={"down_proj": 4}, rank_stabilized=True)
    pk.save_peft(handle, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()
    exact = PeftModel.from_pretrained(copy.deepcopy(base).double(), tmp_path).merge_and_unload().state_dict()
    if select is not None:
        handle.select(*select)
    before = snapshot(handle.model)
    state = handle.merged_state_dict()
    assert_unchanged(handle.model, before)
    assert handle.merge() is handle.model
    assert {name: type(module) for name, module in handle.model.named_modules()} == plain
    assert list(state) == list(theirs.state_dict()) == list(handle.model.state_dict())
    assert_equal(handle.model.state_dict(), state)
    for key, value in state.items():
        allowed = 2 * (theirs.state_dict()[key] - exact[key]).abs().max() + 4 * EPS * exact[key].abs().max()
        assert (value - exact[key]).abs().max() <= allowed, key
        adapted_key = key.removesuffix(".weight") in handle.layers
        assert adapted_key or torch.equal(value, base.state_dict()[key])
        assert adapted_key != torch.equal(value, base.state_dict()[key])


def test_the_linears_parameters_flags_and_modes_are_the_base_s() -> None:
    model = tiny_bert().train()
    model.bert.pooler.dense.weight.requires_grad_(False)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    handle = adapted(model, "all-linear")
    handle.merge()
    assert {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)} == linears
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == parameters
    assert all(linear.training for linear in linears.values())
    for use in (handle.merge, handle.merged_state_dict, handle.restore, lambda: handle.select([0])):
        with pytest.raises(pk.StateError, match=r"taken out by restore\(\) or merge\(\)"):
            use()
    again = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["query"]))
    assert len(again.layers) == 2


def test_an_optimiser_of_the_adapter_is_told() -> None:
    handle = stirred(tiny_llama())
    optimizer = torch.optim.SGD([p for p in handle.model.parameters() if p.requires_grad], lr=0.1)
    handle.merge()
    with pytest.raises(pk.StateError, match=r"that merge\(\) replaced"):
        optimizer.step()


def test_a_graph_made_before_does_not_run_with_the_merged_weight() -> None:
    model = Small()
    handle = adapted(model, ["proj", "lin"])
    inputs = INPUTS.clone().requires_grad_()
    loss = model(inputs).sum()
    handle.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_saved_modules_and_what_an_adapter_replaced_stay(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, modules_to_save=["head"])
    theirs = PeftModel.from_pretrained(Small(), tmp_path).merge_and_unload().eval()
    model = Small().eval()
    handle = pk.load_peft(model, tmp_path)
    handle.merge()
    torch.testing.assert_close(model(INPUTS), theirs(INPUTS))
    assert torch.equal(model.head.weight, theirs.head.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    handle = stirred(tiny_llama().to(dtype))
    exact = {
        name: layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
        for name, layer in handle.layers.items()
    }
    handle.merge()
    for name, value in exact.items():
        merged = handle.model.get_submodule(name).weight
        assert merged.dtype is dtype
        assert (merged - value).abs().max() <= 1.01 * torch.finfo(dtype).eps / 2 * value.abs().max()


def test_the_merged_state_dict_is_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    base = tiny_llama()
    handle = stirred(base)
    handle.select([1])
    handle.model.save_pretrained(tmp_path / "beside", state_dict=handle.merged_state_dict())
    handle.merge().save_pretrained(tmp_path / "in-place")
    expected = handle.model(TOKENS).logits
    for folder in ("beside", "in-place"):
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(loaded(TOKENS).logits, expected)


def test_a_tied_head_gets_its_own_weight_and_is_saved_untied(tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    handle = stirred(base, target_modules=["lm_head", "q_proj"])
    expected = handle.model(TOKENS).logits
    with pytest.warns(pk.PLoRAWarning, match=r"merged weight of lm_head .* set config\.tie_word_embeddings") as found:
        state = handle.merged_state_dict()
    assert found[0].filename == __file__
    assert torch.equal(state["model.embed_tokens.weight"], base.model.embed_tokens.weight)
    with pytest.warns(pk.PLoRAWarning, match="merged weight of lm_head is no longer that") as found:
        model = handle.merge()
    assert found[0].filename == __file__
    assert_equal(model.state_dict(), state)
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.tie_weights()  # as transformers does after it changes embeddings
    assert_equal(model.state_dict(), state)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_block_under_two_names_is_merged_once() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    model.append(model[0])
    handle = adapted(model, ["0.0"])
    x = torch.randn(3, 4)
    expected, state = model(x), handle.merged_state_dict()
    assert list(state) == ["0.0.weight", "0.0.bias", "2.0.weight", "2.0.bias"]
    assert state["0.0.weight"] is state["2.0.weight"]
    handle.merge()
    torch.testing.assert_close(model(x), expected)
    assert model[0] is model[2]


def test_names_are_those_without_torch_compile() -> None:
    model = Small()
    handle = adapted(model, ["proj", "lin"])
    names = list(Small().state_dict())
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.proj = torch.compile(model.proj, backend="eager")
    assert "proj._orig_mod.weight" in model.state_dict()
    assert list(handle.merged_state_dict()) == names


def test_what_cannot_be_merged_is_refused_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    model = nn.Sequential(nn.Linear(24, 24), Linear8bitLt(24, 20))
    quantized = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["0", "1"]))
    changed = adapted(Small(), ["proj", "lin"])
    changed.select([0])
    changed.model.blocks[2].lin.weight.data.add_(1)
    torch.autograd.graph.increment_version(changed.model.blocks[2].lin.weight)
    for handle, message in (
        (quantized, r"layer '1': the weight is quantised .*its modules cannot be merged"),
        (changed, r"layer 'blocks\.2\.lin': weight was changed while modules were folded into it"),
    ):
        modules = dict(handle.model.named_modules())
        weight = next(iter(handle.layers.values())).weight.clone()
        for use in (handle.merge, handle.merged_state_dict):
            with pytest.raises(pk.StateError, match=message):
                use()
        assert dict(handle.model.named_modules()) == modules
        assert torch.equal(next(iter(handle.layers.values())).weight, weight)


def test_an_error_on_the_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = adapted(Small(), ["proj", "lin"])
    handle.select([0, 2])
    before, calls = snapshot(handle.model), []

    def fail_late(layer: pk.FusedPLoRALinear) -> torch.Tensor:
        calls.append(layer)
        if len(calls) == len(handle.layers):
            raise torch.OutOfMemoryError("no memory")
        return original(layer)

    original = pk.FusedPLoRALinear.merged_weight
    monkeypatch.setattr(pk.FusedPLoRALinear, "merged_weight", fail_late)
    with pytest.raises(torch.OutOfMemoryError):
        handle.merge()
    assert_unchanged(handle.model, before)
    monkeypatch.undo()
    assert handle.merge() is handle.model


def test_groups_are_refused() -> None:
    handle = adapted(Small(), ["proj"], rank=2)
    A, B = torch.randn(1, 2, 8), torch.randn(1, 8, 2)
    groups = {"proj": pk.GroupModules.of(pk.RowGroups([3]), A, B)}
    with handle.grouped(groups), pytest.raises(pk.StateError, match="layer 'proj': its modules cannot be merged while"):
        handle.merge()
    handle.merge()
