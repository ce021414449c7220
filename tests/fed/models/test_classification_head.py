"""The head that a run on a checkpoint starts from: the checkpoint's own, or a new one, and the line that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fed.config import RunConfig, parse
from fed.data.federated_data import FederatedData
from fed.data.federated_data import load as load_data
from fed.errors import FedError
from fed.models import base_model, saved_base
from fed.models.head import head_names
from fed.simulation.evaluation import evaluate
from tests.support.text_data import PETS, text_config, write_rows
from tests.support.tiny_bert import make_tiny_bert


class Told:
    """What a run on this checkpoint and these labels says, its data, and its base model."""

    def __init__(self, checkpoint: Path, config: RunConfig) -> None:
        self.lines: list[str] = []
        self.config, self.checkpoint = config, checkpoint
        self.data: FederatedData = load_data(config, self.lines.append)
        self.model: Any
        self.model, self.drawn = base_model.make(config, self.data, self.lines.append)

    def keeps_head(self) -> bool:
        plain = load_file(self.checkpoint / "model.safetensors")
        return all(torch.equal(plain[name], value) for name, value in head_of(self.model).items())


def head_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": value for name in head_names(model)
        for part, value in model.get_submodule(name).state_dict().items()
    }  # fmt: skip


def tell(checkpoint: Path, labels: Sequence[object], **settings: Any) -> Told:
    rows = [{"text": PETS[number % 8], "label": labels[number % len(labels)]} for number in range(60)]
    path = write_rows(checkpoint / "rows.jsonl", rows)
    return Told(checkpoint, text_config(path, checkpoint, cache=False, **settings))


def bert_with(directory: Path, labels: Sequence[str], **changes: Any) -> Path:
    """Return a tiny BERT with these labels; `changes` are made to its config.json."""
    make_tiny_bert(directory, PETS, hidden=32, labels=tuple(labels))
    edit(directory, changes)
    return directory


def edit(directory: Path, changes: Mapping[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(changes)))


TWELVE = [f"LABEL_{number}" for number in range(12)]


@pytest.mark.parametrize(
    ("head", "labels", "order"),
    [
        (TWELVE, list(range(12)), tuple(map(str, range(12)))),
        (TWELVE, [str(number) for number in range(12)], tuple(map(str, range(12)))),
        (["NEGATIVE", "POSITIVE"], ["positive", "negative"], ("negative", "positive")),
        (["LABEL_0", "LABEL_1"], [True, False], ("False", "True")),
        (["sadness", "joy"], ["joy", "sadness"], ("sadness", "joy")),
    ],
)
def test_the_checkpoints_head_is_used_for_its_labels_in_its_order(
    head: list[str], labels: list[object], order: tuple[str, ...], tmp_path: Path
) -> None:
    told = tell(bert_with(tmp_path, head), labels)
    assert told.data.label_names == order
    assert told.keeps_head()
    assert told.lines == []
    numbers = told.data.test.table.batch(torch.arange(len(labels)))["labels"].tolist()
    assert [order[number] for number in numbers] == [str(label) for label in labels]


def test_a_head_that_has_more_labels_than_the_rows_is_used_whole_and_said(tmp_path: Path) -> None:
    told = tell(bert_with(tmp_path, ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")), ["contradiction", "entailment"])
    assert told.data.label_names == ("entailment", "NEUTRAL", "contradiction")
    assert told.keeps_head()
    assert told.lines == ["the checkpoint's head has 3 labels; no row has 'NEUTRAL'"]


@pytest.mark.parametrize(
    ("head", "labels", "reason"),
    [
        (
            ["sadness", "joy", "anger"],
            ["sports", "politics", "tech"],
            "the labels of the checkpoint's head are 'sadness', 'joy', 'anger', those of the data 'politics', 'sports',"
            " 'tech'",
        ),
        (
            ["LABEL_0", "LABEL_1"],
            ["good", "bad"],
            "the labels of the checkpoint's head are 'LABEL_0', 'LABEL_1', those of the data 'bad', 'good'",
        ),
        (
            ["LABEL_0", "LABEL_1"],
            [1, 2],
            "the labels of the checkpoint's head are 'LABEL_0', 'LABEL_1', those of the data '1', '2'",
        ),
    ],
)
def test_a_head_for_other_labels_is_drawn_anew_and_said(
    head: list[str], labels: list[object], reason: str, tmp_path: Path
) -> None:
    told = tell(bert_with(tmp_path, head), labels)
    assert not torch.equal(told.model.classifier.weight, load_head(tmp_path)["classifier.weight"])
    assert told.lines == [f"model.path is {str(tmp_path)!r}: {reason}; the run starts from a new head"]
    assert told.model.config.id2label == dict(enumerate(told.data.label_names))


def load_head(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights = load_file(checkpoint / "model.safetensors")
    return {name: value for name, value in weights.items() if name.startswith("classifier")}


def test_a_new_head_depends_on_the_seed_alone(tmp_path: Path) -> None:
    checkpoint = bert_with(tmp_path, ("a", "b"))
    first = tell(checkpoint, ["x", "y"])
    torch.rand(3)
    second = base_model.build(first.config, first.data)
    other = base_model.build(first.config.model_copy(update={"seed": 1}), first.data)
    assert torch.equal(first.model.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.classifier.weight)
    assert torch.equal(first.model.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert first.model.classifier.bias.count_nonzero() == 0
    assert first.model.classifier.weight.std().item() == pytest.approx(0.1, rel=0.5)  # its initializer_range


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    """A RoBERTa whose head of two layers has the labels a and b; nothing in it is 0."""
    bert_with(tmp_path, ("a", "b"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=99, max_position_embeddings=99, pad_token_id=0, id2label={0: "a", 1: "b"}, **sizes)
    )
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.fill_(1.0)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("labels", [["x", "y"], ["x", "y", "z"]], ids=["as many", "more"])
def test_all_layers_of_a_head_are_drawn_anew(roberta: Path, labels: list[str]) -> None:
    told = tell(roberta, labels)
    assert len(told.lines) == 1
    assert all((value != 1).all() for value in head_of(told.model).values())
    assert tell(roberta, ["b", "a"]).keeps_head()


def test_a_head_that_is_not_whole_is_drawn_anew(roberta: Path) -> None:
    weights = load_file(roberta / "model.safetensors")
    del weights["classifier.dense.bias"]
    save_file(weights, roberta / "model.safetensors", metadata={"format": "pt"})
    told = tell(roberta, ["a", "b"])
    assert all((value != 1).all() for value in head_of(told.model).values())
    assert len(told.lines) == 1
    assert "the checkpoint's head has no classifier.dense.bias for its 2 labels; the run starts" in told.lines[0]


def test_a_checkpoint_that_lost_its_head_has_none(roberta: Path) -> None:
    weights = {
        name: value for name, value in load_file(roberta / "model.safetensors").items() if "classifier" not in name
    }
    save_file(weights, roberta / "model.safetensors", metadata={"format": "pt"})
    (line,) = tell(roberta, ["a", "b"]).lines
    assert line.endswith("the checkpoint has no classification head; the run starts from a new head")


def test_a_head_of_another_size_than_its_labels_is_drawn_anew(tmp_path: Path) -> None:
    checkpoint = bert_with(tmp_path, ("a", "b", "c"), id2label={"0": "a", "1": "b"})
    told = tell(checkpoint, ["a", "b"])
    assert told.model.classifier.weight.shape == (2, 32)
    assert "the checkpoint's head has no classifier.bias for its 2 labels; the run starts" in told.lines[0]


@pytest.mark.parametrize("made", [BertForTokenClassification, BertModel, BertForMaskedLM])
def test_the_head_of_another_task_is_no_classification_head(made: Any, tmp_path: Path) -> None:
    checkpoint = bert_with(tmp_path, ("LABEL_0", "LABEL_1"))
    made.from_pretrained(checkpoint).save_pretrained(checkpoint)
    told = tell(checkpoint, [0, 1])
    new = [line for line in told.lines if "starts from a new head" in line]
    assert len(new) == 1
    assert "the checkpoint has no classification head; the run starts from a new head" in new[0]
    pooler = [line for line in told.lines if "pooler" in line]
    assert len(pooler) == (made is not BertModel)  # which only this class has kept


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"problem_type": "multi_label_classification"}, True),
        ({"problem_type": "single_label_classification"}, True),
        ({"problem_type": "regression"}, False),
        ({"architectures": None}, True),
        ({"id2label": {"1": "a", "2": "b"}}, False),
        ({"id2label": {"0": "a", "1": "a"}}, False),
    ],
    ids=str,
)
def test_the_loss_is_cross_entropy_whatever_the_head_was_for(
    changes: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    told = tell(bert_with(tmp_path, ("a", "b"), **changes), ["a", "b"])
    assert told.keeps_head() is kept
    assert len(told.lines) == (not kept)
    with torch.no_grad():
        loss = told.model(**told.data.test.batch(torch.arange(len(told.data.test)))).loss
    assert loss.item() == pytest.approx(evaluate(told.model, told.data.test)["loss"], rel=1e-5)


def test_a_regression_head_is_no_head_for_labels(tmp_path: Path) -> None:
    told = tell(bert_with(tmp_path, ("LABEL_0",), problem_type="regression"), [0, 1])
    assert told.model.classifier.weight.shape == (2, 32)
    assert "the checkpoint has no classification head" in told.lines[0]


def test_a_backbone_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoint = bert_with(tmp_path / "wide", ("a", "b"), vocab_size=50)
    with pytest.raises(FedError, match=r"does not load: bert.embeddings.word_embeddings.weight is \(\d+, 32\), not"):
        tell(checkpoint, ["a", "b"])
    checkpoint = bert_with(tmp_path / "empty", ("a", "b"))
    save_file(load_head(checkpoint), checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FedError, match=r"does not load: it holds no weight of BertForSequenceClassification$"):
        tell(checkpoint, ["a", "b"])


@pytest.mark.parametrize(
    ("head", "order", "kept"),
    [
        (["LABEL_0", "LABEL_1"], ("not_same", "same"), True),
        (["LABEL_1", "LABEL_0"], ("same", "not_same"), True),
        (["Same", "Not same"], ("same", "not_same"), True),
        (["yes", "no"], ("not_same", "same"), False),
    ],
)
def test_label_k_is_the_number_that_the_data_source_gives(
    head: list[str], order: tuple[str, ...], kept: bool, tmp_path: Path
) -> None:
    checkpoint = bert_with(tmp_path / "bert", head)
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["not_same", "same"])})
    rows = {"sentence": PETS * 8, "label": [0, 1, 1, 0] * 16}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-0.parquet")
    config = parse(
        {
            "model": {"path": str(checkpoint)},
            "data": {"name": "hub", "path": str(tmp_path / "data"), "text": "sentence", "cache": False},
            "clients": {"count": 2, "per_round": 2},
        },
        "here",
    )
    told = Told(checkpoint, config)
    assert told.data.label_names == order
    assert told.keeps_head() is kept
    assert len(told.lines) == (not kept)


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "referred"])
def test_a_saved_base_keeps_its_labels_and_is_refused_for_others(copied: bool, tmp_path: Path) -> None:
    told = tell(bert_with(tmp_path / "bert", ("LABEL_0", "LABEL_1")), [1, 0])
    model = told.config.model.model_copy(update={"copy_base": copied})
    saved_base.save(told.model, told.config.model_copy(update={"model": model}), tmp_path / "base", told.drawn)
    again = saved_base.reopen(tmp_path / "base", told.data.label_names)
    assert torch.equal(again.classifier.weight, told.model.classifier.weight)
    architecture = AutoConfig.from_pretrained(tmp_path / "base")
    assert architecture.id2label == {0: "0", 1: "1"}
    weights = tmp_path / ("base" if copied else "bert")
    plain = AutoModelForSequenceClassification.from_pretrained(weights, config=architecture)
    assert torch.equal(plain.bert.pooler.dense.weight, told.model.bert.pooler.dense.weight)
    with pytest.raises(FedError, match=r"has the labels '0', '1', and the data '1', '0'; model.path and data.path sho"):
        saved_base.reopen(tmp_path / "base", ("1", "0"))
