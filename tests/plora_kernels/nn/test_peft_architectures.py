"""Adapters of many architectures: what is saved here loads in PEFT, what PEFT saves loads here, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import plora_kernels as pk
from tests.support.architectures import ARCHITECTURES, SIZES, Architecture, stir


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_saved_here_loads_in_peft_and_here(tmp_path: Path, name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    task = architecture.task_type
    config = pk.PLoRAConfig(rank=3, alpha=5, target_modules="all-linear", task_type=task)
    handle = pk.inject(model, config)
    plain = architecture.output(model)
    stir(model)
    expected = architecture.output(model)
    assert (expected - plain).abs().max() > 1e-3  # far above what assert_close allows
    pk.save_peft(handle, tmp_path)
    torch.testing.assert_close(architecture.output(PeftModel.from_pretrained(architecture.model(), tmp_path)), expected)
    again = architecture.model()
    assert list(pk.load_peft(again, tmp_path).layers) == list(handle.layers)
    torch.testing.assert_close(architecture.output(again), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_peft_saves_loads_here(tmp_path: Path, name: str) -> None:
    architecture = ARCHITECTURES[name]
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type=architecture.task_type)
    theirs = stir(get_peft_model(architecture.model(), config)).eval()
    theirs.save_pretrained(tmp_path)
    model = architecture.model()
    handle = pk.load_peft(model, tmp_path)
    torch.testing.assert_close(architecture.output(model), architecture.output(theirs))
    pk.save_peft(handle, tmp_path / "again")
    reloaded = PeftModel.from_pretrained(architecture.model(), tmp_path / "again")
    torch.testing.assert_close(architecture.output(reloaded), architecture.output(theirs))


@pytest.mark.parametrize(
    ("name", "task_type", "target", "inside"),
    [
        ("roberta", "SEQ_CLS", r".*(query|classifier\.dense)", "classifier.dense"),
        ("electra", "SEQ_CLS", r".*(query|classifier\.out_proj)", "classifier.out_proj"),
        ("bert", "SEQ_CLS", ["query", "classifier"], "classifier"),
        ("bert", "TOKEN_CLS", ["query", "classifier"], "classifier"),
        ("mistral", "SEQ_CLS", ["q_proj", "score"], "score"),
    ],
)
def test_adapters_in_heads_that_peft_saves_whole_are_refused(
    tmp_path: Path, name: str, task_type: str, target: object, inside: str
) -> None:
    # The task type is new to the adapter, which was injected without one.
    handle = pk.inject(ARCHITECTURES[name].model(), pk.PLoRAConfig(rank=2, target_modules=target))
    message = f"{inside!r} is adapted, but PEFT saves {inside.split('.')[0]!r} whole for task_type {task_type!r}"
    with pytest.raises(pk.TargetError, match=message):
        pk.save_peft(handle, tmp_path / "adapter", task_type=task_type)
    assert not (tmp_path / "adapter").exists()


def test_adapters_with_a_models_names_of_older_versions_load_as_in_peft(tmp_path: Path) -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        image = {key: SIZES[key] for key in SIZES if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
        parts = {"text_config": LlamaConfig(**SIZES), "vision_config": CLIPVisionConfig(**image)}
        return LlavaForConditionalGeneration(LlavaConfig(image_token_index=63, **parts)).double().eval()

    theirs = stir(get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"])))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    older = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}
    tensors = load_file(path)
    for now, before in older.items():
        tensors = {key.replace(f".model.{now}", f".model.{before}"): value for key, value in tensors.items()}
    assert all(key.startswith(tuple(f"base_model.model.{name}" for name in older.values())) for key in tensors)
    save_file(tensors, path)
    model = build()
    handle = pk.load_peft(model, tmp_path)
    expected = {name: value for name, value in theirs.get_base_model().named_parameters() if "lora_A" in name}
    assert len(expected) == len(handle.layers) == 4
    for name, (lora_A, _) in handle.factors().items():
        assert torch.equal(lora_A, expected[f"{name}.lora_A.default.weight"])
    llava = Architecture(build)
    torch.testing.assert_close(llava.output(model), llava.output(PeftModel.from_pretrained(build(), tmp_path)))


def test_layers_that_peft_cannot_share_with_us_are_refused(tmp_path: Path) -> None:
    # GPT-2's projections are transformers' Conv1D.
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=20))

    get_peft_model(build(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path)
    with pytest.raises(
        pk.TargetError, match=r"'transformer\.h\.0\.attn\.c_attn', a Conv1D; only plain nn\.Linear works"
    ):
        pk.load_peft(build(), tmp_path)


def test_layers_that_peft_takes_for_stacked_experts_are_refused_with_the_reason(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=8, **SIZES, **experts))  # its first layer is no mixture
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["q_proj", "down_proj"]))
    message = (
        r"'model\.layers\.0\.mlp\.down_proj' is adapted, .*: it would adapt the stacked experts 'model\.layers\.1\."
    )
    with pytest.raises(pk.TargetError, match=message):
        pk.save_peft(handle, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_base_is_the_one_given_or_the_one_the_model_was_loaded_from(tmp_path: Path) -> None:
    ARCHITECTURES["llama"].model().save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for model, given, expected in (
        (loaded, None, str(tmp_path / "base")),
        (ARCHITECTURES["llama"].model(), None, None),
        (ARCHITECTURES["llama"].model(), "some/base", "some/base"),
        (loaded, tmp_path / "base", str(tmp_path / "base")),
        (torch.nn.Sequential(torch.nn.Linear(4, 4)), None, None),
    ):
        handle = pk.inject(model, pk.PLoRAConfig(rank=1, target_modules=r"0|.*q_proj"))
        pk.save_peft(handle, tmp_path / "adapter", base_model_name_or_path=given)
        handle.restore()
        written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == expected


def test_task_types_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    for injected, given, outcome in (
        (None, "FOO", "task_type is 'FOO'; it may be None or one of SEQ_CLS, "),
        (None, "seq_cls", "task_type is 'seq_cls'; it may be None or one of SEQ_CLS, "),
        ("SEQ_CLS", "TOKEN_CLS", "task_type is 'TOKEN_CLS', but the adapter was injected with task_type 'SEQ_CLS'"),
        ("SEQ_CLS", None, None),
        ("SEQ_CLS", TaskType.SEQ_CLS, None),
        (None, TaskType.SEQ_CLS, None),
    ):
        config = pk.PLoRAConfig(rank=1, target_modules=["query"], task_type=injected)
        handle = pk.inject(ARCHITECTURES["bert"].model(), config)
        folder = tmp_path / f"{injected}-{given}"
        if outcome is None:
            pk.save_peft(handle, folder, task_type=given)
            assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
        else:
            with pytest.raises(pk.ConfigError, match=outcome):
                pk.save_peft(handle, folder, task_type=given)
            assert not folder.exists()
