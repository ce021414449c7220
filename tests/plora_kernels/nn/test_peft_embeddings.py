"""Embeddings of a changed vocabulary are saved with an adapter and loaded into a base that was resized alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import plora_kernels as pk
from tests.support.adapter_folders import Small, assert_unchanged, snapshot
from tests.support.architectures import ARCHITECTURES, SIZES, Architecture, stir

IGNORED = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
pytestmark = IGNORED

RESIZED = ["bert", "bert-mlm", "distilbert-mlm", "llama", "llama-tied", "opt", "phi", "t5", "bart"]
TARGETS = r".*\.(query|q_lin|q_proj|q)"


def resizer(name: str, size: int, folder: Path) -> Callable[[int], nn.Module]:
    """Return a function that loads the architecture's base and resizes its vocabulary, new rows drawn from a seed."""
    base = ARCHITECTURES[name].model()
    head = base.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        nn.init.normal_(head.bias)
    base.save_pretrained(folder / "base")

    def resized(seed: int) -> nn.Module:
        model = type(base).from_pretrained(folder / "base").eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(size, mean_resizing=False)
        return model

    return resized


def newest(architecture: Architecture, size: int) -> Architecture:
    """Return the architecture called with the last tokens of a vocabulary."""
    tokens = torch.tensor([[3, size - 2, size - 1, 5]])
    return Architecture(architecture.build, architecture.task_type, dict.fromkeys(architecture.inputs, tokens))


@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.parametrize("size", [70, 61])
def test_a_changed_vocabulary_is_saved_and_loaded(tmp_path: Path, name: str, size: int) -> None:
    resized, architecture = resizer(name, size, tmp_path), newest(ARCHITECTURES[name], size)
    model = resized(1)
    handle = pk.inject(model, pk.PLoRAConfig(rank=3, target_modules=TARGETS, task_type=architecture.task_type))
    stir(model)
    expected = architecture.output(model)
    pk.save_peft(handle, tmp_path / "adapter")
    again = resized(2)
    handle = pk.load_peft(again, tmp_path / "adapter")
    torch.testing.assert_close(architecture.output(again), expected)
    torch.testing.assert_close(
        architecture.output(PeftModel.from_pretrained(resized(3), tmp_path / "adapter").eval()), expected
    )
    again.name_or_path = again.config._name_or_path = ""  # what the file brought along is saved again nevertheless
    pk.save_peft(handle, tmp_path / "again")
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "again")]
    assert files[0].keys() == files[1].keys()
    base = type(model).from_pretrained(tmp_path / "base")
    before = snapshot(base)
    with pytest.raises(pk.ShapeError, match=rf"call model\.resize_token_embeddings\({size}\) first"):
        pk.load_peft(base, tmp_path / "adapter")
    assert_unchanged(base, before)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "bert-mlm"])
def test_what_peft_saves_of_a_changed_vocabulary_loads_here(tmp_path: Path, name: str) -> None:
    resized, architecture = resizer(name, 70, tmp_path), newest(ARCHITECTURES[name], 70)
    theirs = stir(get_peft_model(resized(1), LoraConfig(r=3, target_modules=TARGETS))).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = resized(2)
    pk.load_peft(model, tmp_path / "adapter")
    torch.testing.assert_close(architecture.output(model), architecture.output(theirs))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("selected", [None, "folded", "frozen"])
def test_an_adapted_output_layer_keeps_its_base_weight(tmp_path: Path, name: str, selected: str | None) -> None:
    resized, architecture = resizer(name, 70, tmp_path), newest(ARCHITECTURES[name], 70)
    model = resized(1)
    handle = pk.inject(model, pk.PLoRAConfig(rank=3, target_modules=["q_proj", "lm_head"]))
    stir(model)
    expected = architecture.output(model)
    if selected and not (selected == "folded" and name == "llama-tied"):
        handle.select([0], selected)
    pk.save_peft(handle, tmp_path / "adapter")
    for loaded in (resized(2), PeftModel.from_pretrained(resized(3), tmp_path / "adapter").eval()):
        if not isinstance(loaded, PeftModel):
            pk.load_peft(loaded, tmp_path / "adapter")
        torch.testing.assert_close(architecture.output(loaded), expected)


def keys(folder: Path) -> set[str]:
    """Return the keys in an adapter's file without those of factors, and without PEFT's prefix."""
    found = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.") for key in found if ".lora_" not in key}


def test_the_vocabulary_of_the_base_decides(tmp_path: Path) -> None:
    both = {"model.embed_tokens.weight", "lm_head.weight"}
    resized = resizer("llama", 70, tmp_path)
    unnamed = ARCHITECTURES["llama"].model()
    unnamed.resize_token_embeddings(70, mean_resizing=False)
    for case, (model, base, wanted, expected) in enumerate(
        (
            (resized(1), None, "auto", both),
            (resized(1), None, False, set()),
            (unnamed, str(tmp_path / "base"), "auto", both),
            (unnamed, None, "auto", set()),  # of no known base, as in PEFT
            (unnamed, None, True, both),
            (resizer("llama", 64, tmp_path)(1), None, "auto", set()),
            (resizer("llama", 64, tmp_path)(1), None, True, both),
        )
    ):
        handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["q_proj"]))
        folder = tmp_path / str(case)
        pk.save_peft(handle, folder, base_model_name_or_path=base, save_embedding_layers=wanted)
        assert keys(folder) == expected, case
        handle.restore()


def test_a_base_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def connect(*arguments: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    model = ARCHITECTURES["llama"].model()
    model.name_or_path = "some/base"
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["q_proj"]))
    message = "the configuration of 'some/base' cannot be read, so it is not known whether embeddings were resized"
    with pytest.warns(UserWarning, match=message):
        pk.save_peft(handle, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.save_peft(handle, tmp_path, save_embedding_layers=True)
        pk.save_peft(handle, tmp_path, save_embedding_layers=False)


def test_models_without_embeddings(tmp_path: Path) -> None:
    handle = pk.inject(Small(), pk.PLoRAConfig(rank=2, target_modules=["proj"]))
    pk.save_peft(handle, tmp_path)
    with pytest.raises(
        pk.TargetError, match="save_embedding_layers is True, but the model has no get_input_embeddings"
    ):
        pk.save_peft(handle, tmp_path, save_embedding_layers=True)
    with pytest.raises(pk.ConfigError, match="save_embedding_layers is 'yes'; True, False or 'auto' is needed"):
        pk.save_peft(handle, tmp_path, save_embedding_layers="yes")
    vit = ARCHITECTURES["vit"].model()
    handle = pk.inject(vit, pk.PLoRAConfig(rank=2, target_modules=r".*q_proj|.*query"))
    pk.save_peft(handle, tmp_path, save_embedding_layers=True)
    assert any("patch_embeddings" in key for key in keys(tmp_path))


def vision_and_language() -> tf.LlavaForConditionalGeneration:
    """Return a model whose vocabulary stands in a configuration of its own for the language part."""
    vision = {"image_size": 16, "patch_size": 8, "projection_dim": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {
        "text_config": tf.LlamaConfig(vocab_size=64, **sizes),
        "vision_config": tf.CLIPVisionConfig(**sizes, **vision),
    }
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(image_token_index=63, **parts))


def encoder_and_decoder() -> tf.EncoderDecoderModel:
    """Return a model of two vocabularies."""
    decoder = tf.BertConfig(is_decoder=True, add_cross_attention=True, **SIZES)
    return tf.EncoderDecoderModel(encoder=tf.BertModel(tf.BertConfig(**SIZES)), decoder=tf.BertLMHeadModel(decoder))


def test_vocabularies_of_parts_are_compared_too(tmp_path: Path) -> None:
    both = {
        "encoder.embeddings.word_embeddings.weight",
        "decoder.cls.predictions.decoder.weight",
        "decoder.cls.predictions.decoder.bias",
    }
    for build, parts, expected in (
        (vision_and_language, [""], {"model.language_model.embed_tokens.weight", "lm_head.weight"}),
        (encoder_and_decoder, ["encoder", "decoder"], both),
    ):
        folder = tmp_path / build.__name__
        build().save_pretrained(folder / "base")
        for size, saved in ((70, expected), (64, set())):
            model = type(build()).from_pretrained(folder / "base")
            for part in parts:
                model.get_submodule(part).resize_token_embeddings(size, mean_resizing=False)
            handle = pk.inject(
                model, pk.PLoRAConfig(rank=1, target_modules=r".*(encoder.*query|language_model.*q_proj)")
            )
            pk.save_peft(handle, folder / str(size))
            assert keys(folder / str(size)) == saved
