"""TRL's trainers with adapted models: the losses and weights of PEFT's adapters, and checkpoints of the adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import plora_kernels as pk
from tests.support.architectures import stir
from tests.support.equality import assert_equal
from tests.support.models import tiny_llama
from tests.support.tiers import slow

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(57))]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send nothing: TRL's trainers count their uses over the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


class AdapterSFT(pk.AdapterCheckpoints, SFTTrainer):
    """Supervised training whose checkpoints hold the adapter."""


class AdapterDPO(pk.AdapterCheckpoints, DPOTrainer):
    """Preference optimisation against the model that training starts from, or against `ref_model`."""


class AgainstBase(AdapterDPO):
    """Preference optimisation against the base model."""

    def compute_ref_log_probs(self, *arguments: Any, **options: Any) -> Any:
        with self.adapter.disable():
            return super().compute_ref_log_probs(*arguments, **options)


def said(row: int, words: int) -> str:
    return " ".join(f"w{(row * 7 + place * (row % 3 + 2)) % 57}" for place in range(words))


def texts() -> Dataset:
    return Dataset.from_list([{"prompt": said(row, 4), "completion": f" {said(row + 1, 6)}"} for row in range(8)])


def preferences() -> Dataset:
    rows = [
        {"prompt": said(row, 4), "chosen": f" {said(row + 1, 5)}", "rejected": f" {said(row + 2, 7)}"}
        for row in range(8)
    ]
    return Dataset.from_list(rows)


def settings(kind: type, folder: Path, **options: Any) -> Any:
    return kind(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=0.01, save_steps=3,
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, seed=5, max_length=32,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip


def models() -> tuple[pk.Injected, PeftModel]:
    """Return an adapted model and PEFT's of the same base, with the same factors; B is not zero."""
    base, lora = tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    theirs = stir(get_peft_model(copy.deepcopy(base), lora))
    handle = pk.inject(base, pk.PLoRAConfig.from_peft(lora))
    found = {name: value for name, value in theirs.named_parameters() if "lora_" in name}
    prefix = "base_model.model."
    handle.set_factors(
        {name: tuple(found[f"{prefix}{name}.lora_{side}.default.weight"] for side in "AB") for name in handle.layers}
    )
    return handle, theirs


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def merged(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    return model.merge_and_unload().named_parameters()


def assert_trained_alike(handle: pk.Injected, ours: Any, model: PeftModel, theirs: Any) -> None:
    assert len(losses(ours)) == 6
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3)  # they are logged with four digits
    state = handle.merged_state_dict()
    for name, parameter in merged(model):
        torch.testing.assert_close(state[name], parameter.data, rtol=1e-3, atol=1e-4)


def test_supervised_training_is_as_with_peft(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    handle, model = models()
    options = {"train_dataset": texts(), "processing_class": tokenizer}
    ours = AdapterSFT(handle, args=settings(SFTConfig, tmp_path / "ours"), **options)
    theirs = SFTTrainer(model, args=settings(SFTConfig, tmp_path / "theirs"), **options)
    ours.train()
    theirs.train()
    assert_trained_alike(handle, ours, model, theirs)
    files = {path.name for path in (tmp_path / "ours" / "checkpoint-6").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "optimizer.pt"} <= files
    assert "model.safetensors" not in files
    loaded = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / "ours" / "checkpoint-6")
    assert set(loaded.peft_config["default"].target_modules) == set(handle.layers)


@pytest.mark.parametrize("reference", ["start", *slow("base", "given")])
def test_preferences_are_optimised_as_with_peft(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, reference: str
) -> None:
    handle, model = models()
    given = {"ref_model": copy.deepcopy(model).unload()} if reference != "start" else {}
    options = {"train_dataset": preferences(), "processing_class": tokenizer}
    theirs = DPOTrainer(model, args=settings(DPOConfig, tmp_path / "theirs"), **options, **given)
    arguments = settings(DPOConfig, tmp_path / "ours", precompute_ref_log_probs=reference != "given")
    kind = AgainstBase if reference == "base" else AdapterDPO
    ours = kind(handle, args=arguments, **options, **(given if reference == "given" else {}))
    ours.train()
    theirs.train()
    # Only the adapter's own start, which TRL copies for PEFT, gives log 2 at first.
    assert (losses(ours)[0] == pytest.approx(0.6931, abs=1e-3)) == (reference == "start")
    assert_trained_alike(handle, ours, model, theirs)


@pytest.mark.parametrize("selection", [*slow(None, ([0, 2], "folded")), ([1], "frozen")], ids=str)
@pytest.mark.parametrize("kind", ["sft", *slow("dpo")])
def test_it_resumes_from_the_adapter(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str, selection: tuple | None
) -> None:
    def run(**resume: Any) -> tuple[pk.Injected, Any]:
        torch.manual_seed(0)
        handle, _ = models()
        if selection is not None:
            handle.select(*selection)
        options = {"processing_class": tokenizer}
        if kind == "sft":
            trainer = AdapterSFT(handle, args=settings(SFTConfig, tmp_path), train_dataset=texts(), **options)
        else:
            arguments = settings(DPOConfig, tmp_path, precompute_ref_log_probs=True)
            trainer = AdapterDPO(handle, args=arguments, train_dataset=preferences(), **options)
        trainer.train(**resume)
        return handle, trainer

    handle, through = run()
    again, resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(through)
    assert_equal(again.model.state_dict(), handle.model.state_dict())


def test_an_adapted_output_layer_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    handle = pk.inject(tiny_llama(), pk.PLoRAConfig(rank=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(pk.StateError, match="'lm_head' is adapted, but TRL computes log-probabilities from its weight"):
        AdapterSFT(handle, args=settings(SFTConfig, tmp_path), train_dataset=texts(), processing_class=tokenizer)


def test_adapters_of_trl_s_own_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    handle, _ = models()
    lora = LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM")
    with pytest.raises(pk.StateError, match="put another model in place of the adapted one; leave out its peft_config"):
        AdapterSFT(
            handle, args=settings(SFTConfig, tmp_path), train_dataset=texts(), processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip
