"""`AutoPeftModel` and its classes for tasks open, from the folder alone, what is saved here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import plora_kernels as pk
from tests.support.architectures import SIZES, T5, TOKENS, stir

BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16)}
VIT = {"image_size": 16, "patch_size": 8, **{key: SIZES[key] for key in SIZES if key != "vocab_size"}}
# The task type, its class of AutoPeftModel, the base and what it is called with.
TASKS: dict[str, tuple[str | None, str, Any, dict[str, Tensor]]] = {
    "causal": ("CAUSAL_LM", "ForCausalLM", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), {}),
    "seq2seq": ("SEQ_2_SEQ_LM", "ForSeq2SeqLM", lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), BOTH),
    "sequences": (
        "SEQ_CLS", "ForSequenceClassification",
        lambda: tf.BertForSequenceClassification(tf.BertConfig(num_labels=5, **SIZES)), {},
    ),
    "sequences by score": (
        "SEQ_CLS", "ForSequenceClassification",
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(num_labels=4, pad_token_id=0, **SIZES)), {},
    ),
    "tokens": (
        "TOKEN_CLS", "ForTokenClassification",
        lambda: tf.BertForTokenClassification(tf.BertConfig(num_labels=4, **SIZES)), {},
    ),
    "questions": (
        "QUESTION_ANS", "ForQuestionAnswering", lambda: tf.BertForQuestionAnswering(tf.BertConfig(**SIZES)), {},
    ),
    "features": ("FEATURE_EXTRACTION", "ForFeatureExtraction", lambda: tf.BertModel(tf.BertConfig(**SIZES)), {}),
    "no task": (None, "", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), {}),
    "no task, no text": (None, "", lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT)), IMAGES),
    "no task, no head": (None, "", lambda: tf.BertModel(tf.BertConfig(**SIZES)), {}),
}  # fmt: skip


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return all tensors that the model returns for its inputs."""
    with torch.no_grad():
        found = model(**(inputs or {"input_ids": TOKENS}), return_dict=True)
    return [value for value in found.values() if isinstance(value, Tensor)]


def test_every_class_of_peft_is_opened() -> None:
    classes = {name for name in peft.__all__ if name.startswith("AutoPeftModel")}
    assert classes == {f"AutoPeftModel{suffix}" for _, suffix, _, _ in TASKS.values()}


@pytest.mark.parametrize("select", [None, [1]], ids=str)
@pytest.mark.parametrize("name", TASKS)
def test_it_computes_the_same(tmp_path: Path, name: str, select: list[int] | None) -> None:
    task, suffix, build, inputs = TASKS[name]
    torch.manual_seed(0)
    build().double().save_pretrained(tmp_path / "base")  # sums differ by 1e-14
    model = type(build()).from_pretrained(tmp_path / "base").eval()
    plain = outputs(model, inputs)
    handle = pk.inject(model, pk.PLoRAConfig(rank=3, target_modules="all-linear", task_type=task))
    stir(model)
    if select is not None:
        handle.select(select)
    expected = outputs(model, inputs)
    assert (expected[0] - plain[0]).abs().max() > 1e-3
    pk.save_peft(handle, tmp_path / "adapter")
    opened = getattr(peft, f"AutoPeftModel{suffix}").from_pretrained(tmp_path / "adapter").eval()
    found = outputs(opened, inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.dtype is theirs.dtype is torch.float64
        torch.testing.assert_close(ours, theirs)


def test_modules_saved_whole_come_along(tmp_path: Path) -> None:
    build = TASKS["causal"][2]
    build().save_pretrained(tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = pk.PLoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    handle = pk.inject(model, config)
    stir(model)
    expected = outputs(model, {})
    pk.save_peft(handle, tmp_path / "adapter")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(opened, {})[0], expected[0])


class OwnConfig(tf.PreTrainedConfig):
    """The settings of a model of one's own."""

    model_type = "own-of-the-tests"

    def __init__(self, width: int = 8, **options: Any) -> None:
        self.width = width
        super().__init__(**options)


class Own(tf.PreTrainedModel):
    """A model of one's own that has `from_pretrained`, but no place in transformers' tables."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.first, self.second = nn.Linear(config.width, 12), nn.Linear(12, 3)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_model_of_one_s_own_is_opened_by_its_class(tmp_path: Path) -> None:
    Own(OwnConfig(width=6)).save_pretrained(tmp_path / "base")
    model = Own.from_pretrained(tmp_path / "base").eval()
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["first"], modules_to_save=["second"]))
    stir(model)
    pk.save_peft(handle, tmp_path / "adapter")
    x = torch.randn(4, 6)
    # PEFT imports a module that is none of the known libraries' only if it is told to.
    opened = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=[__name__]).eval()
    assert type(opened.get_base_model()) is Own
    torch.testing.assert_close(opened(x), model(x))
    again = pk.load_peft(Own.from_pretrained(tmp_path / "base").eval(), tmp_path / "adapter", trainable=False)
    torch.testing.assert_close(again.model(x), model(x))


@pytest.mark.filterwarnings("ignore:.*already registered")
def test_a_registered_model_of_one_s_own_is_opened_by_its_task(tmp_path: Path) -> None:
    tf.AutoConfig.register("own-of-the-tests", OwnConfig, exist_ok=True)
    tf.AutoModel.register(OwnConfig, Own, exist_ok=True)
    Own(OwnConfig()).save_pretrained(tmp_path / "base")
    model = tf.AutoModel.from_pretrained(tmp_path / "base").eval()
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["first"], task_type="FEATURE_EXTRACTION"))
    stir(model)
    pk.save_peft(handle, tmp_path / "adapter")
    opened = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter").eval()
    x = torch.randn(2, 8)
    torch.testing.assert_close(opened.get_base_model()(x), model(x))
