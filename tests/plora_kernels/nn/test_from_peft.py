"""`PLoRAConfig.from_peft`: a `LoraConfig` injects here what PEFT makes of it, or is refused by the field's name."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

import plora_kernels as pk
from tests.support.adapter_folders import Small, assert_unchanged, saved_by_peft, snapshot
from tests.support.models import tiny_bert, tiny_llama

MODELS = {"llama": tiny_llama, "bert": tiny_bert, "small": Small}


def of_peft(model: nn.Module, lora: LoraConfig) -> tuple[dict[str, tuple], set[str]]:
    """Return PEFT's rank, scale and dropout by adapted layer, and the names of what it saves whole."""
    wrapped = get_peft_model(model, lora).get_base_model()
    layers, whole = {}, set()
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            p = getattr(module.lora_dropout["default"], "p", 0.0)
            layers[name] = module.r["default"], pytest.approx(module.scaling["default"]), p
        elif isinstance(module, AuxiliaryTrainingWrapper):
            whole.add(name)
    return layers, whole


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.25}),
        ("llama", {"target_modules": r".*layers\.1\..*(up|gate)_proj", "use_rslora": True, "task_type": "CAUSAL_LM"}),
        ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "k_proj"]}),
        ("llama", {"target_modules": "ALL-linear", "exclude_modules": r".*mlp.*", "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers"]}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [], "inference_mode": True}),
        ("llama", {"task_type": "CAUSAL_LM"}),
        ("bert", {"task_type": "SEQ_CLS", "r": 2}),
        ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
        ("small", {"target_modules": ["proj", "lin"], "rank_pattern": {r"blocks\.[01]\.lin": 3, "lin": 5}}),
        ("small", {"target_modules": ["lin"], "alpha_pattern": {"1.lin": 3.5}, "use_rslora": True}),
        ("small", {"target_modules": ["lin"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The following")  # PEFT's, of an exclusion that matches nothing more
def test_it_injects_what_peft_makes_of_it(name: str, fields: dict[str, Any]) -> None:
    model, lora = MODELS[name](), LoraConfig(**fields)
    layers, whole = of_peft(copy.deepcopy(model), copy.deepcopy(lora))
    before, written = snapshot(model), copy.deepcopy(lora.to_dict())
    config = pk.PLoRAConfig.from_peft(lora, model)
    assert_unchanged(model, before)
    assert lora.to_dict() == written
    handle = pk.inject(model, config)
    ours = {name: (layer.rank, layer.scale, layer.dropout) for name, layer in handle.layers.items()}
    assert ours == layers
    assert set(handle.saved_modules) == whole
    assert config.task_type == fields.get("task_type")


def test_a_model_is_asked_for_only_where_it_decides() -> None:
    for fields in ({}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}):
        with pytest.raises(
            pk.ConfigError, match=r"has (target_modules = None|layers_to_transform = \[1\]), which means"
        ):
            pk.PLoRAConfig.from_peft(LoraConfig(**fields))
        given = pk.PLoRAConfig.from_peft(LoraConfig(**fields), target_modules=["o_proj"])
        assert given.target_modules == ["o_proj"]
    with pytest.raises(pk.TargetError, match=r"PEFT cannot adapt the model .*target_modules"):
        pk.PLoRAConfig.from_peft(LoraConfig(), Small())  # of no type that PEFT has a choice for


def test_overrides_replace_fields_and_names_are_in_one_order() -> None:
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj", "q_proj"], exclude_modules=["b", "a"])
    config = pk.PLoRAConfig.from_peft(lora, adapter_dtype="bfloat16", rank=7, fuse_projections=True)
    assert (config.rank, config.alpha, config.adapter_dtype) == (7, 6.0, torch.bfloat16)
    assert config.fuse_projections
    assert (config.target_modules, config.exclude_modules) == (["q_proj", "v_proj"], ["a", "b"])
    with pytest.raises(pk.ConfigError, match=r"'lora_alpha' is not a field of PLoRAConfig; the nearest are .*alpha"):
        pk.PLoRAConfig.from_peft(lora, lora_alpha=3)


REFUSED = {
    "use_dora": (True, "use_dora = True; only False is supported"),
    "bias": ("lora_only", "bias = 'lora_only'; only 'none' is supported"),
    "lora_bias": (True, "lora_bias = True; only False"),
    "target_parameters": (["proj.weight"], "target_parameters = "),
    "layer_replication": ([(0, 1)], "layer_replication = "),
    "trainable_token_indices": ([1], "trainable_token_indices = "),
    "use_qalora": (True, "use_qalora = True"),
    "alora_invocation_tokens": ([1], "alora_invocation_tokens = "),
    "ensure_weight_tying": (True, "ensure_weight_tying = True; only False"),
    "init_lora_weights": (False, "init_lora_weights = False; inject starts as True does"),
    "r": (0, "r = 0; a positive integer is needed"),
    "lora_alpha": ("16", "lora_alpha = '16'; a positive number is needed"),
    "lora_dropout": (1.0, "lora_dropout = 1.0; a probability"),
    "modules_to_save": ("head", "modules_to_save = 'head'; a list of names"),
    "rank_pattern": ({"lin": "4"}, r"rank_pattern\['lin'\] = '4'; a positive integer"),
    "target_modules": ("(a+)+b", "target_modules in the LoraConfig holds .* for ever to match"),
}


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.filterwarnings("ignore:aLoRA is currently")
def test_what_is_not_computed_here_is_refused_by_the_fields_name(field: str) -> None:
    value, message = REFUSED[field]
    lora = LoraConfig(**{"target_modules": ["proj"], field: value})
    with pytest.raises(pk.ConfigError, match=message):
        pk.PLoRAConfig.from_peft(lora, Small())


@pytest.mark.parametrize("start", ["gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "eva", "mica", None])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
def test_every_other_start_is_refused(start: str | None) -> None:
    lora = LoraConfig(target_modules=["proj"], init_lora_weights=start)
    with pytest.raises(pk.ConfigError, match=f"init_lora_weights = {start!r}; inject starts as True does"):
        pk.PLoRAConfig.from_peft(lora)


def test_variants_that_are_tables_are_refused_whatever_they_hold() -> None:
    variants = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    assert variants
    for name in variants:
        lora = LoraConfig(target_modules=["proj"])
        setattr(lora, name, True)
        with pytest.raises(pk.ConfigError, match=f"the LoraConfig has {name} = True; only"):
            pk.PLoRAConfig.from_peft(lora)


def test_what_is_no_lora_config_is_refused() -> None:
    class Own(LoraConfig):
        pass

    custom = LoraConfig(target_modules=["proj"])
    custom._register_custom_module({nn.LSTM: nn.LSTM})
    for given, message in (
        (LoHaConfig(target_modules=["proj"]), "from_peft got a LoHaConfig; a peft.LoraConfig is needed"),
        ({"r": 4}, "got a dict"),
        (Own(target_modules=["proj"]), "got a Own"),
        (custom, "has layers of its own for LSTM"),
    ):
        with pytest.raises(pk.ConfigError, match=message):
            pk.PLoRAConfig.from_peft(given)
    with pytest.raises(pk.RankError, match="300"):
        pk.PLoRAConfig.from_peft(LoraConfig(r=300, target_modules=["proj"]))


@pytest.mark.filterwarnings("ignore:`eva_config` specified")
def test_fields_that_say_nothing_are_passed_over() -> None:
    lora = LoraConfig(target_modules=["proj"], eva_config=EvaConfig(), base_model_name_or_path="some/base")
    lora.runtime_config.ephemeral_gpu_offload = True
    assert pk.PLoRAConfig.from_peft(lora).target_modules == ["proj"]


def test_the_configuration_of_a_saved_adapter_is_one_too(tmp_path: Any) -> None:
    lora = LoraConfig.from_pretrained(saved_by_peft(tmp_path, rank_pattern={"lin": 2}, modules_to_save=["head"]))
    handle, loaded = pk.inject(Small(), pk.PLoRAConfig.from_peft(lora)), pk.load_peft(Small(), tmp_path)
    assert {n: (a.rank, a.scale) for n, a in handle.layers.items()} == {
        n: (a.rank, a.scale) for n, a in loaded.layers.items()
    }
    assert handle.saved_modules == loaded.saved_modules
    assert all(layer.lora_A.requires_grad for layer in handle.layers.values())
