"""Adapters in another dtype than their weight: fp32 over half precision, by default, through all a layer does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import plora_kernels as pk
from tests.support.adapter_folders import Small, change_tensors, saved_by_peft
from tests.support.equality import assert_equal
from tests.support.models import adapted, tiny_llama

HALF = [torch.bfloat16, torch.float16]
# The setting, the weight's dtype, and that of the factors, or what the error says.
SETTINGS = [
    ("auto", torch.float64, torch.float64),
    ("auto", torch.float32, torch.float32),
    ("auto", torch.bfloat16, torch.float32),
    ("auto", torch.float16, torch.float32),
    ("float32", torch.float16, torch.float32),
    ("bfloat16", torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float32, torch.bfloat16, torch.float32),
    (
        "float16",
        torch.bfloat16,
        "adapter_dtype is torch.float16, but the weight is torch.bfloat16, .* or torch.float32",
    ),
    (torch.float64, torch.float16, "adapter_dtype is torch.float64, but the weight is torch.float16"),
    ("bfloat16", torch.float32, "adapter_dtype is torch.bfloat16, but the weight is torch.float32, .* of that$"),
    ("float32", torch.float64, "adapter_dtype is torch.float32, but the weight is torch.float64"),
]


def make(dtype: torch.dtype = torch.bfloat16, **options: object) -> pk.FusedPLoRALinear:
    """Return a layer (50 → 29) of rank 6 without a zero module, over a weight of half precision."""
    layer = pk.FusedPLoRALinear(50, 29, rank=6, alpha=3.0, dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def dtypes(layer: pk.FusedPLoRALinear) -> set[torch.dtype]:
    return {factor.dtype for factor in (layer.lora_A, layer.lora_B, *layer.factors())}


@pytest.mark.parametrize(("setting", "weight", "expected"), SETTINGS, ids=str)
def test_the_setting_means_the_same_in_every_place(
    setting: object, weight: torch.dtype, expected: torch.dtype | str, tmp_path: Path
) -> None:
    saved = saved_by_peft(tmp_path)
    config = pk.PLoRAConfig(rank=2, target_modules=["proj"], adapter_dtype=setting)  # no weight is known yet
    models = [Small().to(weight) for _ in range(2)]
    makers: list[Callable[[], pk.FusedPLoRALinear]] = [
        lambda: pk.FusedPLoRALinear(8, 4, dtype=weight, adapter_dtype=setting),
        lambda: pk.FusedPLoRALinear.from_linear(nn.Linear(8, 4, dtype=weight), adapter_dtype=setting),
        lambda: pk.inject(models[0], config).layers["proj"],
        lambda: pk.load_peft(models[1], saved, adapter_dtype=setting).layers["proj"],
    ]
    for make_layer in makers:
        if isinstance(expected, torch.dtype):
            layer = make_layer()
            assert dtypes(layer) == {expected}
            assert layer.weight.dtype is layer.bias.dtype is weight
        else:
            with pytest.raises(pk.DTypeError, match=expected):
                make_layer()
    if isinstance(expected, str):
        assert all(type(module) is nn.Linear for module in (models[0].proj, models[1].proj))
        assert models[0].proj.weight.requires_grad
        with pytest.raises(pk.DTypeError, match=r"^layer 'proj': adapter_dtype is"):
            pk.inject(models[0], config)


@pytest.mark.parametrize("value", ["fp32", "torch.float32", "int8", torch.int8, torch.complex64, None, 32, [], "AUTO"])
def test_another_setting_is_named(value: object, tmp_path: Path) -> None:
    message = r"adapter_dtype is .*; it may be 'auto', a torch dtype or one of float16, bfloat16, float32, float64"
    with pytest.raises(pk.ConfigError, match=message):
        pk.PLoRAConfig(adapter_dtype=value)
    with pytest.raises(pk.ConfigError, match=message):
        pk.FusedPLoRALinear.from_linear(nn.Linear(8, 4), adapter_dtype=value)
    with pytest.raises(pk.ConfigError, match=message):
        pk.load_peft(Small(), saved_by_peft(tmp_path), adapter_dtype=value)


# ------------------------------------------------------------------------------------------------------- training


def test_small_steps_move_every_entry_as_they_do_in_peft() -> None:
    # AdamW at 1e-4 over bf16: in bf16 most entries of A, which are of order 0.1, would stay where they are.
    moved = {}
    for kind in ("pk", "peft", "half"):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(64, 64)).bfloat16()
        if kind == "peft":
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
        else:
            setting = "bfloat16" if kind == "half" else "auto"
            pk.inject(model, pk.PLoRAConfig(rank=8, alpha=16, target_modules=["0"], adapter_dtype=setting))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        nn.init.normal_(next(p for name, p in trained.items() if "lora_B" in name), std=0.1)
        start = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
        for _ in range(5):
            x = torch.randn(16, 64).bfloat16()
            optimizer.zero_grad()
            (model(x) - x).float().square().mean().backward()
            optimizer.step()
        states = {value.dtype for state in optimizer.state.values() for key, value in state.items() if key != "step"}
        assert states == {torch.bfloat16 if kind == "half" else torch.float32}
        moved[kind] = [(p != start[name]).float().mean().item() for name, p in trained.items()]
    assert moved["pk"] == moved["peft"] == [1.0, 1.0]
    assert moved["half"][0] < 0.5


@pytest.mark.parametrize("original", ["device", "host"])
@pytest.mark.parametrize("form", ["folded", "frozen"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_selection_keeps_fp32_and_folds_with_one_rounding(dtype: torch.dtype, form: str, original: str) -> None:
    layer = make(dtype, original=original)
    weight, factors = layer.weight.detach().clone(), layer.factors()
    for chosen in ([1, 4], [0, 5], [], range(6), [2]):
        layer.select(chosen, form)
        assert dtypes(layer) == {torch.float32}
        expected = pk.fold(weight, *factors, chosen, scale=layer.scale) if form == "folded" else weight
        assert torch.equal(layer.weight, expected)
        assert_equal(layer.factors(), factors)
        x = torch.randn(3, 50).to(dtype).requires_grad_()
        layer(x).float().sum().backward()
        if len(chosen):
            assert {layer.lora_A.grad.dtype, layer.lora_B.grad.dtype} == {torch.float32}
    layer.select([1, 4], form)
    with torch.no_grad():
        layer.lora_A += 2.0**-20  # lost in half precision
    layer.unfold()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.lora_A[[1, 4]], factors[0][[1, 4]] + 2.0**-20)
    assert torch.equal(layer.lora_A[[0, 2, 3, 5]], factors[0][[0, 2, 3, 5]])


def test_a_merge_is_rounded_once() -> None:
    layer = make()
    exact = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    merged = layer.merge()
    assert merged.weight.dtype is torch.bfloat16
    assert torch.equal(merged.weight, exact.float().bfloat16())


@pytest.mark.parametrize("form", [None, "folded", "frozen"])
def test_state_dicts_copies_and_pickles_keep_both_dtypes(form: str | None) -> None:
    layer = make()
    weight = layer.weight.detach().clone()
    if form is not None:
        layer.select([0, 3], form)
    state = layer.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "weight": torch.bfloat16, "bias": torch.bfloat16, "lora_A": torch.float32, "lora_B": torch.float32,
    }  # fmt: skip
    assert torch.equal(state["weight"], weight)
    fresh = make()
    fresh.load_state_dict(state)
    x = torch.randn(3, 50).bfloat16()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert_equal(other.factors(), layer.factors())
        assert dtypes(other) == {torch.float32}
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    layer.load_state_dict(fresh.state_dict())
    assert layer.selected == (None if form is None else (0, 3))
    assert dtypes(layer) == {torch.float32}


@pytest.mark.parametrize("form", [None, "folded", "frozen"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_casting_a_model_casts_all_of_it_as_torch_does(cast: torch.dtype, form: str | None) -> None:
    layer = make()
    if form is not None:
        layer.select([0, 3], form)
    layer.to(cast)
    assert {tensor.dtype for tensor in (*layer.parameters(), *layer.factors())} == {cast}
    layer(torch.randn(3, 50, dtype=cast)).float().sum().backward()
    layer.unfold()
    assert {tensor.dtype for tensor in layer.parameters()} == {cast}
    layer.select([1], "folded")


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_factors_cast_by_a_caller_fold_and_come_back_as_fp32(form: str) -> None:
    layer = make()
    layer.select(range(6), form)
    expected = tuple(2 * factor for factor in layer.factors())
    layer.lora_A.data, layer.lora_B.data = (factor.double() for factor in expected)
    with pytest.raises(pk.DTypeError, match=r"lora_A is torch.float64, x is torch.bfloat16"):
        layer(torch.randn(3, 50).bfloat16())
    layer.unfold()
    assert_equal((layer.lora_A.detach(), layer.lora_B.detach()), expected)


# -------------------------------------------------------------------------------------------- layers of a model


@pytest.mark.parametrize("form", [None, "folded", "frozen"])
def test_projections_of_one_input_run_together(form: str | None, launches: list[int]) -> None:
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = tiny_llama().bfloat16()
        handle = adapted(model, ["q_proj", "k_proj", "v_proj"], std=0.3, fuse_projections=fused)
        if form is not None:
            handle.select([0, 2], form)
        embeddings = model.get_input_embeddings()(torch.arange(24).reshape(2, 12)).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        logits.float().square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        results.append((logits.detach(), embeddings.grad, gradients))
    assert launches == [3, 3]
    assert torch.equal(results[0][0], results[1][0])
    for together, apart in zip(results[0][2], results[1][2], strict=True):  # dX of three has other roundings
        torch.testing.assert_close(together, apart, rtol=0.05, atol=0.02 * apart.abs().max().item())


def test_groups_train_stacks_of_fp32() -> None:
    model = tiny_llama().bfloat16()
    handle = adapted(model, ["q_proj", "down_proj"], std=0.3)
    rows, tokens = pk.RowGroups([2, 1]), torch.arange(15).view(3, 5)
    groups, leaves = {}, {}
    for name, layer in handle.layers.items():
        stacks = tuple(torch.stack([factor, 2 * factor]).requires_grad_() for factor in layer.factors())
        leaves[name] = stacks, tuple(torch.full_like(stack, torch.nan) for stack in stacks)
        groups[name] = pk.GroupModules.of(rows, *stacks, scale=layer.scale, gradients=leaves[name][1])
    with handle.grouped(groups):
        together = model(input_ids=tokens).logits
    _, unused = pk.group_gradients(together.float().square().sum(), groups)
    assert unused == []
    for which, samples in enumerate((tokens[:2], tokens[2:])):
        handle.set_factors({name: tuple(stack[which].detach() for stack in leaves[name][0]) for name in leaves})
        model.zero_grad()
        alone = model(input_ids=samples).logits
        alone.float().square().sum().backward()
        torch.testing.assert_close(together.split([2, 1])[which], alone, rtol=0.02, atol=0.02)
        for name, layer in handle.layers.items():
            for stacked, own in zip(leaves[name][1], (layer.lora_A.grad, layer.lora_B.grad), strict=True):
                assert stacked.dtype is own.dtype is torch.float32
                torch.testing.assert_close(stacked[which], own, rtol=0.05, atol=0.03 * own.abs().max().item())


# ---------------------------------------------------------------------------------------------------- PEFT's files


def in_file(directory: Path) -> dict[str, Tensor]:
    """Return the factors in a saved adapter."""
    return {name: value for name, value in load_file(directory / "adapter_model.safetensors").items() if "lora" in name}


@pytest.mark.parametrize("weight", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("file", [torch.float32, *HALF], ids=str)
def test_files_are_loaded_in_the_dtype_that_peft_loads_them_in(
    file: torch.dtype, weight: torch.dtype, tmp_path: Path
) -> None:
    saved = change_tensors(saved_by_peft(tmp_path), lambda tensors: {n: v.to(file) for n, v in tensors.items()})
    theirs = PeftModel.from_pretrained(Small().to(weight), saved)
    handle = pk.load_peft(Small().to(weight), saved)
    for name, (A, B) in handle.factors().items():
        layer = theirs.base_model.model.get_submodule(name)
        assert_equal((A, B), (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()))
    pk.save_peft(handle, tmp_path / "again")
    again = in_file(tmp_path / "again")
    assert {value.dtype for value in again.values()} == {torch.float32}
    assert_equal(again, {name: value.float() for name, value in in_file(saved).items()})


def test_files_keep_half_precision_if_that_is_asked_for(tmp_path: Path) -> None:
    saved = saved_by_peft(tmp_path)
    handle = pk.load_peft(Small().bfloat16(), saved, adapter_dtype="bfloat16")
    pk.save_peft(handle, tmp_path / "again")
    again = in_file(tmp_path / "again")
    assert_equal(again, {name: value.bfloat16() for name, value in in_file(saved).items()})
    theirs = PeftModel.from_pretrained(Small().bfloat16(), tmp_path / "again", autocast_adapter_dtype=False)
    factors = dict(theirs.base_model.model.proj.named_parameters())
    assert torch.equal(factors["lora_A.default.weight"], handle.layers["proj"].lora_A)
