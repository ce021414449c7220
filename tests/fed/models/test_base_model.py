"""Base models: pretrained by the run or read from a checkpoint, and checkpoints that are refused."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fed.config import RunConfig, load
from fed.data import pretrained
from fed.data.federated_data import FederatedData
from fed.data.federated_data import load as load_data
from fed.data.tables import DenseTable, Split
from fed.errors import FedError
from fed.models import base_model, saved_base
from fed.models.head import head_names
from fed.simulation.evaluation import evaluate
from tests.support import text_data as texts
from tests.support.notes import note_calls


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load("digits", ["model.pretrain_steps=80"])


@pytest.fixture(scope="module")
def digits(config: RunConfig) -> FederatedData:
    return load_data(config)


def test_the_embedded_vit_is_drawn_from_the_seed_and_nothing_else(config: RunConfig, digits: FederatedData) -> None:
    before = torch.get_rng_state()
    one = base_model.build(config, digits)
    torch.rand(3)
    two, other = base_model.build(config, digits), base_model.build(load("digits", ["seed=1"]), digits)
    weights = [next(model.parameters()) for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.set_rng_state(before)
    base_model.build(config, digits)
    assert torch.equal(before, torch.get_rng_state())


def test_the_base_learns_upright_digits_and_reloads_with_plain_transformers(
    config: RunConfig, digits: FederatedData, tmp_path: Path
) -> None:
    model, seen = base_model.build(config, digits), []
    base_model.pretrain(model, digits.pretrain, config, lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == list(range(1, 81))
    assert seen[-1][1] < seen[0][1]
    assert not model.training
    assert evaluate(model, digits.undisturbed)["accuracy"] > 0.6
    assert evaluate(model, digits.test)["accuracy"] < 0.4
    saved_base.save(model, config, tmp_path / "base", ())
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "base").eval()
    inputs = digits.test.batch(torch.arange(5))["pixel_values"]
    with torch.no_grad():
        assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert again.config.id2label == dict(enumerate("0123456789"))


def test_one_step_of_central_training_is_enough(digits: FederatedData) -> None:
    config = load("digits", ["model.pretrain_steps=1", "model.pretrain_batch_size=2000"])
    base_model.pretrain(base_model.build(config, digits), digits.pretrain, config)


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11, 14, 15])
def test_the_learning_rate_rises_and_falls_over_any_number_of_steps(
    digits: FederatedData, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = note_calls(monkeypatch, torch.optim.AdamW, "step", lambda optimizer: optimizer.param_groups[0]["lr"])
    config = load("digits", [f"model.pretrain_steps={steps}", "model.pretrain_batch_size=2"])
    base_model.pretrain(base_model.build(config, digits), digits.pretrain, config)
    assert len(rates) == steps
    peak = rates.index(max(rates))
    assert peak <= max(1, steps / 4)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


text_config = partial(texts.text_config, "rows.jsonl")


def text_data(*names: str) -> FederatedData:
    tokens = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    split = Split.whole(DenseTable(tokens, torch.zeros(2, dtype=torch.int64)))
    return FederatedData((split,), split, None, None, names)


def test_a_checkpoint_keeps_its_head_for_its_labels_and_gets_a_new_one_for_others(bert: Path) -> None:
    config = text_config(bert)
    same, other = base_model.build(config, text_data("dog", "cat")), base_model.build(config, text_data("a", "b", "c"))
    plain = AutoModelForSequenceClassification.from_pretrained(bert)
    assert torch.equal(same.classifier.weight, plain.classifier.weight)
    assert other.classifier.weight.shape == (3, 32)
    assert other.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert torch.equal(same.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    again = base_model.build(config, text_data("a", "b", "c"))
    assert torch.equal(again.classifier.weight, other.classifier.weight)


def test_a_checkpoint_is_saved_with_its_tokenizer(bert: Path, tmp_path: Path) -> None:
    config = text_config(bert)
    made = base_model.make(config, text_data("one", "two"))
    saved_base.save(made.model, config, tmp_path / "base", made.drawn)
    again = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert again("a cat").input_ids == AutoTokenizer.from_pretrained(bert)("a cat").input_ids


def test_heads_are_found_by_name(bert: Path, config: RunConfig, digits: FederatedData) -> None:
    assert head_names(base_model.build(config, digits)) == ("classifier",)
    assert head_names(base_model.build(text_config(bert), text_data("one", "two"))) == ("classifier",)
    distilbert = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=9, dim=8, hidden_dim=8, n_heads=2))
    assert head_names(distilbert) == ("pre_classifier", "classifier")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A decoder whose tokenizer has an end token and no padding token."""
    words = {"<unk>": 0, "</s>": 1, "cat": 2, "dog": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "llama")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=4, **sizes)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_decoder_without_a_padding_token_pads_with_its_end_token(llama: Path) -> None:
    config = text_config(llama)
    assert pretrained.load_tokenizer(config).pad_token == "</s>"
    model = base_model.build(config, text_data("x", "y"))
    assert model.config.pad_token_id == 1
    assert head_names(model) == ("score",)


def test_a_path_that_holds_no_checkpoint_is_refused(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(FedError, match=r"model.path is '.*none': no such directory"):
        base_model.build(text_config(tmp_path / "none"), text_data("x", "y"))
    with pytest.raises(FedError, match=r"model.path is .*: no config.json there"):
        base_model.build(text_config(tmp_path), text_data("x", "y"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FedError, match=r"its config.json does not load"):
        pretrained.saved_label_names(text_config(tmp_path))
    with pytest.raises(FedError, match=r"data.max_length is 999: the checkpoint takes at most 128 tokens"):
        pretrained.saved_label_names(text_config(bert, max_length=999))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"tokenizer.json": None, "tokenizer_config.json": None, "vocab.txt": None}, "its tokenizer knows no words"),
        ({"tokenizer.json": "{}"}, "its tokenizer does not load"),
        ({"model.safetensors": None}, "the checkpoint does not load"),
        ({"model.safetensors": "nonsense"}, "the checkpoint does not load"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(bert: Path, tmp_path: Path, damage: dict, message: str) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(bert, path)
    for name, content in damage.items():
        (path / name).unlink() if content is None else (path / name).write_text(content)
    with pytest.raises(FedError, match=rf"model.path is '.*damaged': {message}") as caught:
        base_model.build(text_config(path), text_data("one", "two"))
    assert "\n" not in str(caught.value)


def test_instructions_need_a_causal_language_model(bert: Path) -> None:
    config = text_config(bert, task="instruction", max_new_tokens=4)
    with pytest.raises(FedError, match=r"model.path is .*: instructions need a causal language model; the che"):
        base_model.build(config, text_data())
