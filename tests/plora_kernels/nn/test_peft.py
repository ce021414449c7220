"""Adapters in PEFT's format, saved and loaded, and training equal to PEFT's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import plora_kernels as pk
from tests.support.equality import assert_equal
from tests.support.models import tiny_bert, tiny_distilbert, tiny_llama

TOKENS = torch.arange(24).reshape(2, 12)
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def stir(model: nn.Module) -> None:
    """Set every trainable parameter to random values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_what_is_saved_here_loads_in_peft_and_computes_the_same(tmp_path: Path, rank_stabilized: bool) -> None:
    base = tiny_bert()
    fresh = copy.deepcopy(base)
    config = pk.PLoRAConfig(
        rank=6,
        alpha=9.0,
        rank_stabilized=rank_stabilized,
        target_modules=["query", "dense"],
        modules_to_save=["classifier"],
        rank_pattern={"query": 3},
        task_type="SEQ_CLS",
    )
    handle = pk.inject(base, config)
    stir(base)
    expected = logits(base)
    handle.select([1])  # all modules are saved, also while some are selected
    pk.save_peft(handle, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == FILES
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 40}},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_what_peft_saves_loads_here_and_computes_the_same(tmp_path: Path, options: dict) -> None:
    base = tiny_llama()
    fresh = copy.deepcopy(base)
    wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options))
    stir(wrapped)
    wrapped.eval()
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    handle = pk.load_peft(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), expected)
    pk.save_peft(handle, tmp_path / "again")
    assert_equal(*(load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")))


@pytest.mark.parametrize("build", [tiny_bert, tiny_distilbert], ids=lambda build: build.__name__)
@pytest.mark.parametrize("saved", [(), ("classifier",)], ids=str)
def test_heads_that_peft_looks_for_by_itself(tmp_path: Path, build: type, saved: tuple[str, ...]) -> None:
    # For SEQ_CLS PEFT keeps every module whose name ends with "classifier" or "score", listed or not.
    base = build()
    fresh, again = copy.deepcopy(base), copy.deepcopy(base)
    targets = ["query"] if build is tiny_bert else ["q_lin"]
    config = pk.PLoRAConfig(rank=2, target_modules=targets, modules_to_save=saved, task_type="SEQ_CLS")
    handle = pk.inject(base, config)
    stir(base)
    expected = logits(base)
    pk.save_peft(handle, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(fresh, tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(logits(theirs), expected)
    stir(theirs)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    handle = pk.load_peft(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), expected)
    assert "classifier" in handle.saved_modules


@pytest.mark.parametrize(
    ("targets", "saved"),
    [(["q_proj"], "model.embed_tokens"), (["q_proj", "lm_head"], "lm_head")],
    ids=str,
)
def test_embeddings_that_peft_saves_whole_are_loaded(tmp_path: Path, targets: list[str], saved: str) -> None:
    fresh = tiny_llama()
    wrapped = get_peft_model(copy.deepcopy(fresh), LoraConfig(r=2, target_modules=targets))
    stir(wrapped)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    with torch.no_grad():
        fresh.get_submodule(saved).weight.zero_()  # must come from the file
    pk.load_peft(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), expected)


def test_patterns_name_one_module_each(tmp_path: Path) -> None:
    # A key such as "proj" would also match "inner.proj": the two have ranks of their own.
    def build() -> nn.Module:
        model = nn.Module()
        model.proj, model.inner, model.other = nn.Linear(4, 4), nn.Module(), nn.Linear(4, 4)
        model.inner.proj = nn.Linear(4, 4)
        return model

    config = pk.PLoRAConfig(
        rank=1,
        target_modules=["proj", "other"],
        rank_pattern={"^inner.proj": 3, "^proj": 2},
        alpha_pattern={"^proj": 5.0},
    )
    handle = pk.inject(build(), config)
    pk.save_peft(handle, tmp_path)
    PeftModel.from_pretrained(build(), tmp_path)
    again = pk.load_peft(build(), tmp_path)
    for name, layer in handle.layers.items():
        assert (again.layers[name].rank, again.layers[name].alpha) == (layer.rank, layer.alpha), name


def test_saving_again_replaces_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    handle = pk.inject(tiny_bert(), pk.PLoRAConfig(rank=2, target_modules=["query"]))
    for _ in range(2):
        stir(handle.model)
        pk.save_peft(handle, tmp_path, base_model_name_or_path="some/base", task_type="SEQ_CLS")
    name = next(iter(handle.layers))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.model.{name}.lora_A.weight"], handle.layers[name].lora_A)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*FILES, "notes.txt"]
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "some/base"
    assert written["task_type"] == "SEQ_CLS"
    assert written["lora_alpha"] == 32
    assert written["target_modules"] == list(handle.layers)


def save_peft_adapter(directory: Path, **options: object) -> None:
    get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query"], **options)).save_pretrained(directory)


def test_adapters_that_cannot_be_used_are_refused_and_the_model_stays(tmp_path: Path) -> None:
    model = tiny_bert()
    with pytest.raises(pk.ConfigError, match=r"adapter_config\.json does not exist"):
        pk.load_peft(model, tmp_path / "missing")
    for option, value, message in (
        ("use_dora", True, "use_dora = True; only False is supported"),
        ("bias", "all", "bias = 'all'; only 'none' is supported"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa', which changes the base"),
    ):
        save_peft_adapter(tmp_path / option, **{option: value})
        with pytest.raises(pk.ConfigError, match=message):
            pk.load_peft(model, tmp_path / option)
    save_peft_adapter(tmp_path / "broken")
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    with pytest.raises(pk.ConfigError, match="is not an adapter's configuration"):
        pk.load_peft(model, tmp_path / "broken")
    save_peft_adapter(tmp_path / "cut")
    whole = (tmp_path / "cut" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(pk.ConfigError, match="is not a safetensors file, or is cut off"):
        pk.load_peft(model, tmp_path / "cut")
    (tmp_path / "file").write_text("")
    with pytest.raises(pk.ConfigError, match="file is a file; a directory is needed"):
        pk.save_peft(pk.inject(tiny_bert(), pk.PLoRAConfig(target_modules=["query"])), tmp_path / "file")
    save_peft_adapter(tmp_path / "plain")
    with pytest.raises(pk.TargetError, match=r"factors for 'bert\..*query', which is not in the model"):
        pk.load_peft(tiny_llama(), tmp_path / "plain")
    save_peft_adapter(tmp_path / "head", modules_to_save=["classifier"])
    with pytest.raises(pk.ShapeError, match=r"'classifier\.bias' is \(3,\); the model's is \(2,\)"):
        pk.load_peft(tiny_bert(labels=2), tmp_path / "head")
    assert not any(isinstance(m, pk.FusedPLoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_is_loaded_and_saved(tmp_path: Path) -> None:
    save_peft_adapter(tmp_path / "theirs", lora_dropout=0.25)
    handle = pk.load_peft(tiny_bert(), tmp_path / "theirs")
    assert {layer.dropout for layer in handle.layers.values()} == {0.25}
    pk.save_peft(handle, tmp_path / "ours")
    assert LoraConfig.from_pretrained(tmp_path / "ours").lora_dropout == 0.25
