"""`restore` after `load_peft`: the model is as it was before, bit for bit, whatever the adapter's file replaced."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import plora_kernels as pk
from tests.plora_kernels.nn.test_hostile_adapters import state_of
from tests.support.adapter_folders import PREFIX, Small, change_tensors, saved_by_peft
from tests.support.hostile_adapters import Tied
from tests.support.models import tiny_bert, tiny_llama

T5 = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 12}


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str]]] = {
    "a head": (Small, {"modules_to_save": ["head"]}, []),
    "a head with figures of its own": (Tied, {"target_modules": ["lin"], "modules_to_save": ["norm"]}, []),
    "a tied head": (Tied, {"target_modules": ["lin"], "modules_to_save": ["head"]}, []),
    "base weights": (Small, {}, ["head.weight", "blocks.0.lin.base_layer.bias", "proj.base_layer.weight"]),
    "a classifier": (tiny_bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}, []),
    "embeddings": (tiny_llama, {"target_modules": ["q_proj"]}, ["model.embed_tokens.weight", "lm_head.weight"]),
    "tied embeddings": (
        lambda: tiny_llama(tied=True),
        {"target_modules": ["q_proj"]},
        ["model.embed_tokens.weight", "lm_head.weight"],
    ),
    "a tied output layer": (
        lambda: tiny_llama(tied=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        [],
    ),
    "one module under several names": (
        lambda: T5ForConditionalGeneration(T5Config(**T5)),
        {"target_modules": ["q"], "modules_to_save": ["shared"]},
        [],
    ),
}


def loaded(folder: Path, name: str) -> tuple[nn.Module, list[object], pk.Injected]:
    """Return a model with an adapter loaded into it, and what it was before."""
    build, options, more = CASES[name]
    torch.manual_seed(0)
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved_by_peft(folder, build, **options)
        extra = {PREFIX + key: model.state_dict()[key.replace(".base_layer", "")] + 1 for key in more}
        change_tensors(folder, lambda tensors: tensors | {key: value.clone() for key, value in extra.items()})
        before = state_of(model)
        return model, before, pk.load_peft(model, folder)


@pytest.mark.parametrize("name", CASES)
def test_all_that_a_file_replaced_is_put_back(tmp_path: Path, name: str) -> None:
    model, before, handle = loaded(tmp_path, name)
    tensors = dict(model.named_parameters())
    with torch.no_grad():  # as training would
        for parameter in tensors.values():
            if parameter.requires_grad:
                parameter.add_(1)
    assert state_of(model) != before
    assert handle.restore() is model
    assert state_of(model) == before


@pytest.mark.parametrize("unselected", ["folded", "frozen"])
@pytest.mark.parametrize("name", ["base weights", "a tied head"])
def test_a_selection_does_not_matter(tmp_path: Path, name: str, unselected: str) -> None:
    model, before, handle = loaded(tmp_path, name)
    handle.select([0, 2], unselected)
    handle.restore()
    assert state_of(model) == before


def test_loading_twice_starts_from_the_base_again(tmp_path: Path) -> None:
    model, before, handle = loaded(tmp_path, "a head")
    values = {name: value.clone() for name, value in model.state_dict().items()}
    handle.restore()
    again = pk.load_peft(model, tmp_path)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    again.restore()
    assert state_of(model) == before


def test_a_model_that_was_cast_since_has_its_former_values_in_the_new_dtype(tmp_path: Path) -> None:
    model, _, handle = loaded(tmp_path, "a head")
    head = Small().head.weight.bfloat16()
    model.bfloat16()
    handle.restore()
    assert torch.equal(model.get_parameter("head.weight"), head)


def test_what_was_resized_since_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    model, before, handle = loaded(tmp_path, "a head")
    head = model.get_submodule("head")
    model.set_submodule("head", nn.Linear(8, 9))
    with pytest.raises(
        pk.StateError, match=r"'head.(weight|bias)' was \(4.*\) and is \(9.*\) now; resize it back first"
    ):
        handle.restore()
    assert list(handle.layers)
    model.set_submodule("head", head)
    handle.restore()
    assert state_of(model) == before


def test_what_inject_trained_is_kept() -> None:
    model = Small()
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["proj"], modules_to_save=["head"]))
    with torch.no_grad():
        model.head.weight.fill_(3)
    handle.restore()
    assert bool((model.head.weight == 3).all())
