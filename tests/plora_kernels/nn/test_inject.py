"""Targets are matched as PEFT matches them, and removing adapters restores the model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import plora_kernels as pk
from tests.support.equality import assert_equal
from tests.support.models import adapted, tiny_bert, tiny_llama
from tests.support.notes import note_calls


def peft_targets(model: nn.Module, **options: object) -> set[str]:
    """Return the module names PEFT adapts for the same arguments."""
    wrapped = get_peft_model(model, LoraConfig(r=2, **options))
    names = {name.removesuffix(".lora_A") for name, _ in wrapped.named_modules() if name.endswith(".lora_A")}
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama], ids=lambda build: build.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"target_modules": r".*\.(query|q_proj)"},
        {"target_modules": ["dense", "down_proj", "query"]},
        {"target_modules": ["dense", "down_proj", "query"], "exclude_modules": r".*\.layer\.0\..*|.*layers\.1\..*"},
        {"target_modules": "all-linear", "modules_to_save": ["dense", "up_proj"]},
    ],
    ids=str,
)
def test_targets_are_those_of_peft(build: type, options: dict) -> None:
    present = {name.rsplit(".", 1)[-1] for name, _ in build().named_modules()}
    options = {  # PEFT ignores names without a match if others match; here each must match
        key: [entry for entry in value if entry in present] if isinstance(value, list) else value
        for key, value in options.items()
    }
    expected = peft_targets(build(), **options)
    handle = pk.inject(build(), pk.PLoRAConfig(rank=2, **options))
    assert set(handle.layers) == expected
    assert expected


def test_rank_and_alpha_patterns() -> None:
    config = pk.PLoRAConfig(
        rank=4,
        alpha=8.0,
        target_modules=["query", "value"],
        rank_pattern={"value": 2},
        alpha_pattern={r"layer.0.*": 6.0},
    )
    layers = pk.inject(tiny_bert(), config).layers
    prefix = "bert.encoder.layer"
    assert layers[f"{prefix}.0.attention.self.query"].scale == 6.0 / 4
    assert layers[f"{prefix}.0.attention.self.value"].scale == 6.0 / 2
    assert layers[f"{prefix}.1.attention.self.query"].scale == 8.0 / 4


def test_inject_trains_the_adapter_and_the_saved_modules_alone() -> None:
    handle = pk.inject(tiny_bert(), pk.PLoRAConfig(target_modules=["query"], modules_to_save=["classifier"]))
    trainable = {name.rsplit(".", 1)[0] for name, p in handle.model.named_parameters() if p.requires_grad}
    assert trainable == {"classifier", *handle.layers}
    assert handle.saved_modules == ("classifier",)


def test_restore_gives_back_the_model_it_was() -> None:
    model = tiny_bert()
    model.bert.pooler.dense.weight.requires_grad_(False)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = adapted(model, "all-linear", rank=16)
    handle.select([0, 5])
    assert handle.restore() is model
    assert {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)} == linears
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert list(model.state_dict()) == list(state)
    assert_equal(model.state_dict(), state)
    with pytest.raises(pk.StateError, match="taken out by restore"):
        handle.select([0])


def test_select_takes_one_selection_or_one_for_each_layer() -> None:
    handle = pk.inject(tiny_bert(), pk.PLoRAConfig(rank=4, target_modules=["query"]))
    first, second = handle.layers
    handle.select([1, 2], "frozen")
    assert {layer.selected for layer in handle.layers.values()} == {(1, 2)}
    handle.select({first: [0], second: torch.tensor([True, True, False, True])})
    assert handle.layers[first].selected == (0,)
    assert handle.layers[second].selected == (0, 1, 3)
    handle.unfold()
    assert all(layer.selected is None for layer in handle.layers.values())


def test_a_selection_that_fails_anywhere_changes_nothing() -> None:
    handle = pk.inject(tiny_bert(), pk.PLoRAConfig(rank=4, target_modules=["query"]))
    first, second = handle.layers
    with pytest.raises(pk.SelectionError, match="module 4"):
        handle.select({first: [0], second: [4]})
    with pytest.raises(pk.TargetError, match=f"selection misses layer '{second}'"):
        handle.select({first: [0]})
    with pytest.raises(pk.TargetError, match=r"selection names layer 'bert\.query'; the nearest adapted layers are"):
        handle.select({first: [0], second: [1], "bert.query": [0]})
    assert all(layer.selected is None for layer in handle.layers.values())


def test_tied_weights_are_never_folded() -> None:
    model = tiny_llama(tied=True)
    handle = pk.inject(model, pk.PLoRAConfig(rank=4, target_modules=["lm_head", "q_proj"]))
    nn.init.normal_(handle.layers["lm_head"].lora_B)
    with pytest.raises(pk.StateError, match="shared with another module"):
        handle.select([0])
    assert all(layer.selected is None for layer in handle.layers.values())
    handle.select([0], "frozen")


def test_unknown_targets_name_the_nearest() -> None:
    with pytest.raises(pk.TargetError, match="'qeury' is not in the model; the nearest names that exist are 'query'"):
        pk.inject(tiny_bert(), pk.PLoRAConfig(target_modules=["qeury"]))
    with pytest.raises(pk.TargetError, match="matches no module"):
        pk.inject(tiny_bert(), pk.PLoRAConfig(target_modules=r"nothing\d+"))
    with pytest.raises(pk.TargetError, match=r"module to save 'clasifier' is not in the model.*'classifier'"):
        pk.inject(tiny_bert(), pk.PLoRAConfig(target_modules=["query"], modules_to_save=["clasifier"]))
    with pytest.raises(pk.TargetError, match=r"is a LayerNorm; only a plain nn\.Linear"):
        pk.inject(tiny_bert(), pk.PLoRAConfig(target_modules=["LayerNorm"]))


def test_a_refused_injection_leaves_the_model_alone() -> None:
    model = tiny_bert()
    with pytest.raises(pk.TargetError):
        pk.inject(model, pk.PLoRAConfig(target_modules=["query", "LayerNorm"]))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, pk.FusedPLoRALinear) for m in model.modules())
    pk.inject(model, pk.PLoRAConfig(target_modules=["query"]))
    with pytest.raises(pk.StateError, match="holds FusedPLoRALinear layers already"):
        pk.inject(model, pk.PLoRAConfig(target_modules=["value"]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 300}, pk.RankError, "rank is 300"),
        ({"rank_pattern": {"q": 0}}, pk.RankError, "rank is 0"),
        ({"alpha": -1.0}, pk.ConfigError, r"alpha is -1\.0"),
        ({"dropout": 1.0}, pk.ConfigError, r"dropout is 1\.0; a probability from 0 to below 1"),
        ({"alpha": float("inf")}, pk.ConfigError, "alpha is inf; a finite number"),
        ({"alpha": "32"}, pk.ConfigError, "alpha is '32'; a finite number"),
        ({"target_modules": "(q"}, pk.ConfigError, r"target_modules holds '\(q', which is not a regular expression"),
        ({"rank_pattern": {"(q": 2}}, pk.ConfigError, "rank_pattern holds"),
        ({"modules_to_save": None}, pk.ConfigError, "modules_to_save is None"),
        ({"target_modules": []}, pk.ConfigError, "target_modules is empty"),
        ({"modules_to_save": "classifier"}, pk.ConfigError, "a list of names is needed"),
        ({"original": "nowhere"}, pk.ConfigError, "original is 'nowhere'"),
    ],
    ids=str,
)
def test_bad_configurations_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.PLoRAConfig(**options)


def hooked() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda *_: None)
    return linear


def with_own_forward() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (hooked, "with hooks, which would be lost"),
        (with_own_forward, "with a forward of its own"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "is a ParametrizedLinear; only a plain"),
    ],
    ids=["hooks", "forward", "parametrized"],
)
def test_linears_that_would_lose_something_are_refused(build: type, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), build())
    with pytest.raises(pk.TargetError, match=message):
        pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_encoder_layers_whose_fast_path_would_pass_the_adapter_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(pk.TargetError, match="set_fastpath_enabled"):
        pk.inject(layer, pk.PLoRAConfig(rank=2, target_modules=["linear1"]))
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        handle = pk.inject(layer.eval(), pk.PLoRAConfig(rank=2, target_modules=["linear1"]))
        x = torch.randn(1, 3, 8)
        with torch.no_grad():
            before = layer(x)
            nn.init.normal_(handle.layers["linear1"].lora_B)
            assert not torch.equal(layer(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_a_saved_module_with_a_shared_weight_is_refused() -> None:
    model = tiny_llama(tied=True)
    with pytest.raises(pk.StateError, match="module to save 'lm_head' shares a weight"):
        pk.inject(model, pk.PLoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("original", ["device", "host"])
@pytest.mark.parametrize("failing", ["fold", "hold", "allocation"])
def test_a_selection_that_fails_half_way_leaves_every_weight_as_it_was(
    failing: str, original: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = adapted(tiny_bert(), ["query", "value"], original=original)
    originals = {name: layer.weight.detach().clone() for name, layer in handle.layers.items()}
    handle.select([0, 2])
    owner, name = {
        "fold": (pk.folding, "run_fold"),
        "hold": (pk.FusedPLoRALinear, "_hold"),
        "allocation": (pk.FusedPLoRALinear, "_keep_original"),
    }[failing]
    calls, real = [], getattr(owner, name)

    def fails_at_the_third(*arguments: object, **named: object) -> object:
        result = real(*arguments, **named)
        calls.append(result)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return result

    monkeypatch.setattr(owner, name, fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        handle.select([1])
    assert len(calls) == 3
    for name, layer in handle.layers.items():
        assert layer.selected is None
        assert layer._original() is None
        assert layer.lora_A.shape[0] == 4
        assert torch.equal(layer.weight, originals[name]), name
    monkeypatch.undo()
    handle.select([1])
    handle.unfold()
    assert_equal({name: layer.weight for name, layer in handle.layers.items()}, originals)


@pytest.mark.usefixtures("kernels")
def test_selecting_folds_all_layers_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from plora_kernels.kernels import fold_many

    launches = note_calls(monkeypatch, fold_many, "_launch", len)
    handle = adapted(tiny_bert(), ["query", "key", "value"])
    expected = {
        name: pk.fold(layer.weight, layer.lora_A, layer.lora_B, [1], scale=layer.scale)
        for name, layer in handle.layers.items()
    }
    handle.select([1])
    assert launches == [6]
    assert_equal({name: layer.weight for name, layer in handle.layers.items()}, expected)


def test_a_weight_changed_in_one_layer_stops_a_selection_before_any_layer_changes() -> None:
    handle = adapted(tiny_bert(), ["query"])
    handle.select([0, 1])
    last = list(handle.layers.values())[-1]
    original = last.state_dict()["weight"].clone()
    with torch.no_grad():
        last.weight.add_(1.0)
    for act in (lambda: handle.select([2]), handle.unfold, handle.restore):
        with pytest.raises(pk.StateError, match="weight was changed while modules were folded"):
            act()
        assert {layer.selected for layer in handle.layers.values()} == {(0, 1)}
    handle.unfold(discard_changes=True)
    assert torch.equal(last.weight, original)


def test_restore_keeps_weights_that_loading_replaced() -> None:
    model, source = tiny_bert(), tiny_bert()
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["query"]))
    name = next(iter(handle.layers))
    model.load_state_dict(source.state_dict(), strict=False, assign=True)
    restored = handle.restore().get_submodule(name)
    assert torch.equal(restored.weight, source.get_submodule(name).weight)
