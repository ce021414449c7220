"""Runs of three sizes that the cost model is held to: models with random weights, and rows of random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from fed.config import RunConfig, load
from fed.data import federated_data
from fed.data.federated_data import FederatedData
from fed.data.tables import InstructionTable, Sequences, Split, Table, TextTable
from fed.experiments.costs.workload import Workload, workload
from fed.models import base_model

CLIENTS, TESTED, LABELS = 8, 4, 3


@dataclass(frozen=True)
class Size:
    """A model: `kind` is "vit" (the embedded one), "llama" or "bert", with rows of `length` tokens.

    `answer` is how many of them a language model learns, and `batch` a client's rows, which are its batch.
    """

    name: str
    kind: str
    width: int = 0
    layers: int = 0
    length: int = 1
    answer: int = 0
    batch: int = 16


SIZES = (
    Size("the embedded ViT", "vit"),
    Size("a small Llama", "llama", width=256, layers=4, length=64, answer=16, batch=8),
    Size("BERT-base", "bert", width=768, layers=12, length=64, batch=4),
)


class Prepared(NamedTuple):
    """A run's configuration, the rows that its costs depend on, its base model and its data."""

    config: RunConfig
    load: Workload
    model: nn.Module
    data: FederatedData


def prepare(size: Size, folder: Path, settings: Sequence[str] = ()) -> Prepared:
    """Return a run of this size with these settings; `folder` gets the configuration of its model."""
    common = [
        *(f"clients.count={CLIENTS}", "clients.per_round=2", "rounds=3", "train.local_steps=1"),
        *(f"train.batch_size={size.batch}", "measure.noise=false", "measure.clients=false", *settings),
    ]
    if size.kind == "vit":
        config = load("digits", [*common, f"data.rows_per_client={size.batch}", f"data.test_rows={TESTED}"])
        data = federated_data.load(config)
        return Prepared(config, workload(config), base_model.build(config, data), data)
    architecture = _architecture(size)
    architecture.save_pretrained(folder)
    answers = size.kind == "llama"
    config = load(
        "digits",
        [
            *("data.name=files", f"data.path={folder}", f"model.path={folder}", 'data.shift="none"'),
            *(f"data.max_length={size.length}", "data.max_new_tokens=4", "measure.generate=last"),
            *(f"data.task={'instruction' if answers else 'classification'}", *common),
        ],
    )
    rows = workload(config, answer=size.answer or None, client_rows=size.batch, test_rows=TESTED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind: Any = transformers.LlamaForCausalLM if answers else transformers.BertForSequenceClassification
        return Prepared(config, rows, kind(architecture), _texts(size, architecture.vocab_size))


def _architecture(size: Size) -> Any:
    heads = {"num_hidden_layers": size.layers, "num_attention_heads": size.width // 64, "hidden_size": size.width}
    if size.kind == "llama":
        return transformers.LlamaConfig(vocab_size=4000, intermediate_size=size.width * 11 // 4, **heads)
    return transformers.BertConfig(num_labels=LABELS, intermediate_size=4 * size.width, **heads)


def _texts(size: Size, vocabulary: int) -> FederatedData:
    """Return texts of equal length, as many as a batch for each client and a few to test on."""
    count = CLIENTS * size.batch + TESTED
    tokens = Sequences.of(torch.randint(3, vocabulary, (count, size.length)).tolist())
    if size.kind == "llama":
        tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=1, decode=lambda tokens, **options: "")
        prompts = torch.full((count,), size.length - size.answer)
        table: Table = InstructionTable(tokens, prompts, [("x",)] * count, tokenizer, 4)
        names: tuple[str, ...] = ()
    else:
        table = TextTable({"input_ids": tokens}, torch.arange(count) % LABELS, 0)
        names = tuple(f"label {number}" for number in range(LABELS))
    *clients, test = (Split(table, rows) for rows in torch.arange(count).split([*[size.batch] * CLIENTS, TESTED]))
    return FederatedData(tuple(clients), test, None, None, names)
