"""A row's outputs do not depend on the rows it shares a batch with, whatever the checkpoint calls its padding token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    FNetConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    MptConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.data.federated_data import load as load_data
from fed.data.pretrained import require_positions
from fed.data.tables import Split
from fed.errors import FedError
from fed.models import base_model, saved_base
from fed.simulation.evaluation import answer
from tests.support.text_data import instruction_config, instructions, text_config, write_rows

WORDS = ("<unk>", "<s>", "</s>", "<pad>", "the", "a", "cat", "dog", "sat", "ran", "Name", "animal", "Input", "Output")
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}
SMALL_GPT2 = {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 1, "n_head": 2}
SMALL_OPT = {**SIZES, **HEADS, "ffn_dim": 32, "word_embed_proj_dim": 32}
MAKERS: dict[str, Callable[..., Any]] = {
    "bert": lambda **more: BertConfig(**SIZES, **HEADS, **more),
    "roberta": lambda **more: RobertaConfig(**SIZES, **HEADS, **more),
    "gpt2": lambda **more: GPT2Config(**SMALL_GPT2, **more),
    "llama": lambda **more: LlamaConfig(**SIZES, **HEADS, **more),
    "gemma": lambda **more: GemmaConfig(**SIZES, **HEADS, num_key_value_heads=2, head_dim=16, **more),
    "bart": lambda **more: BartConfig(
        vocab_size=len(WORDS),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        pad_token_id=3,
        **more,
    ),
    "fnet": lambda **more: FNetConfig(**SIZES, **more),
    "opt": lambda **more: OPTConfig(**SMALL_OPT, **more),
}
ENCODERS = ("bert", "roberta")
DECODERS = ("gpt2", "llama", "gemma", "opt")


def save_tokenizer(directory: Path, pad: str | None, ends: bool, words: tuple[str, ...] = WORDS) -> None:
    """Save a tokenizer of whole words that puts <s> before a text and, if it `ends`, </s> behind it."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single=f"<s> $A{' </s>' if ends else ''}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    ).save_pretrained(directory)


def save_model(directory: Path, family: str, kind: Any, **settings: Any) -> None:
    torch.manual_seed(0)
    model = kind.from_config(MAKERS[family](**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that a wrong token or position shows
    model.save_pretrained(directory)


def classified(directory: Path) -> tuple[RunConfig, FederatedData]:
    texts = ["the cat", "a dog sat", "the cat sat the dog ran", "cat", "a cat </s> sat </s>", "the </s>"]
    rows = [{"text": texts[number % 6], "label": "ab"[number % 2]} for number in range(48)]
    config = text_config(write_rows(directory / "rows.jsonl", rows), directory, cache=False)
    return config, load_data(config)


def logits(model: Any, split: Split, rows: torch.Tensor) -> torch.Tensor:
    batch = split.batch(rows)
    del batch["labels"]
    with torch.no_grad():
        return model.eval()(**batch).logits


def assert_rows_are_independent(model: Any, split: Split) -> torch.Tensor:
    every = torch.arange(len(split))
    together = logits(model, split, every)
    alone = torch.cat([logits(model, split, row[None]) for row in every])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    return alone


@pytest.mark.parametrize("ends", [False, True], ids=["", "ends"])
@pytest.mark.parametrize("pad", [None, "<pad>", "<unk>"])
@pytest.mark.parametrize("of_model", [0, 3])
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
def test_a_row_is_classified_alone_as_in_a_batch(
    family: str, of_model: int, pad: str | None, ends: bool, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path, pad, ends)
    save_model(tmp_path, family, AutoModelForSequenceClassification, pad_token_id=of_model)
    config, data = classified(tmp_path)
    model, drawn = base_model.make(config, data)
    alone = assert_rows_are_independent(model, data.test)
    assert data.test.table.pad == WORDS.index(pad or "</s>")
    if family != "roberta":  # whose positions would be others
        assert model.config.pad_token_id == data.test.table.pad
    saved_base.save(model, config, tmp_path / "base", drawn)
    again = saved_base.reopen(tmp_path / "base", data.label_names)
    assert torch.equal(assert_rows_are_independent(again, data.test), alone)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("of_model", [None, 0, 3])
def test_a_prompt_is_answered_alone_as_in_a_batch(family: str, of_model: int | None, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, None, False)
    save_model(tmp_path, family, AutoModelForCausalLM, pad_token_id=of_model)
    config = instruction_config(write_rows(tmp_path / "rows.jsonl", instructions(40)), tmp_path, cache=False)
    data = load_data(config)
    model: Any = base_model.build(config, data).eval()
    assert model.generation_config.pad_token_id == model.config.pad_token_id == 2
    rows = data.test.rows
    together = answer(model, data.test.table, rows)
    assert together == [answer(model, data.test.table, row[None])[0] for row in rows]


def test_the_text_part_of_a_nested_configuration_pads_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(tmp_path, None, True)
    save_model(tmp_path, "llama", AutoModelForSequenceClassification, pad_token_id=0)
    inner = MAKERS["llama"](pad_token_id=0)
    monkeypatch.setattr(LlamaConfig, "get_text_config", lambda *_, **__: inner)
    config, data = classified(tmp_path)
    model = base_model.build(config, data)
    assert model.config.pad_token_id == inner.pad_token_id == 2
    assert_rows_are_independent(model, data.test)


def test_a_model_that_does_not_mask_padding_is_said(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "<pad>", False)
    save_model(tmp_path, "bert", AutoModelForSequenceClassification, id2label={0: "a", 1: "b"})
    config, data = classified(tmp_path)
    said: list[str] = []
    base_model.build(config, data, said.append)
    assert said == []
    save_model(tmp_path, "fnet", AutoModelForSequenceClassification, id2label={0: "a", 1: "b"})
    base_model.build(config, data, said.append)
    assert len(said) == 1
    assert "FNetForSequenceClassification does not mask padding, so that its answer to a row depends" in said[0]


def test_rows_that_a_model_does_not_take_are_one_line(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "<pad>", False)  # without the end token that this model classifies a text by
    save_model(tmp_path, "bart", AutoModelForSequenceClassification, id2label={0: "a", 1: "b"})
    config, data = classified(tmp_path)
    with pytest.raises(FedError, match=r"model.path is '[^']*': the model does not take the rows: [^\n]+$"):
        base_model.build(config, data)


def test_a_token_that_the_model_does_not_know_is_one_line(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "<pad>", False, (*WORDS, "more"))
    save_model(tmp_path, "llama", AutoModelForSequenceClassification)
    config, data = classified(tmp_path)
    base_model.build(config, data)  # no row has it
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "more", "label": "ab"[number % 2]} for number in range(48)])
    config = text_config(path, tmp_path, cache=False)
    with pytest.raises(
        FedError, match=r"its tokenizer makes token 14 \('more'\), and the model knows 14 tokens; it sh"
    ):
        base_model.build(config, load_data(config))
    save_tokenizer(tmp_path, "[PAD]", False)  # an added padding token, which the model was not resized for
    config, data = classified(tmp_path)
    with pytest.raises(FedError, match=r"its tokenizer makes token 14 \('\[PAD\]'\), and the model knows 14 tokens"):
        base_model.build(config, data)


@pytest.mark.parametrize(
    ("architecture", "most"),
    [
        (BertConfig(**SIZES, **HEADS, max_position_embeddings=34), 34),
        (RobertaConfig(**SIZES, **HEADS, max_position_embeddings=34, pad_token_id=0), 33),
        (RobertaConfig(**SIZES, **HEADS, max_position_embeddings=34, pad_token_id=3), 30),
        (XLMRobertaConfig(**SIZES, **HEADS, max_position_embeddings=34), 32),
        (MPNetConfig(**SIZES, **HEADS, max_position_embeddings=34, pad_token_id=0), 32),
        (OPTConfig(**SMALL_OPT, max_position_embeddings=34), 34),
        (GPT2Config(**SMALL_GPT2, n_positions=34), 34),
        (LlamaConfig(**SIZES, **HEADS, max_position_embeddings=34), 34),
        (MptConfig(vocab_size=len(WORDS), d_model=32, n_layers=1, n_heads=2, max_seq_len=34), 34),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_the_longest_row_is_one_that_the_model_takes(architecture: Any, most: int, tmp_path: Path) -> None:
    architecture.save_pretrained(tmp_path)
    require_positions(text_config("f", tmp_path, max_length=most))
    for length in (most + 1, most + 2, 999):
        with pytest.raises(FedError, match=rf"max_length is {length}: the checkpoint takes at most {most} tokens$"):
            require_positions(text_config("f", tmp_path, max_length=length))
    model = AutoModelForSequenceClassification.from_config(architecture)
    model.config.pad_token_id = 3
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 5), attention_mask=torch.ones(1, most, dtype=torch.int64))


@pytest.mark.parametrize("named", ["bloom", "t5", "xlnet"])
def test_a_model_without_a_limit_takes_rows_of_any_length(named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": named, "n_positions": 34}))
    require_positions(text_config("f", tmp_path, max_length=9999))
