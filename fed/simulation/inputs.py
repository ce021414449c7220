"""Digests of what a run starts from, its rows and its base model, by which it is known again when it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, InstructionTable, Sequences, Table, TextTable
from fed.errors import FedError
from fed.files import digest_of, new_digest

ROWS, DEALT, LABELS, TOKENIZER, BASE = "rows", "partition", "labels", "tokenizer", "base model"
# What messages name them.
CALLED = {
    ROWS: "the rows of the data",
    DEALT: "which rows are for testing and which are each client's",
    LABELS: "the labels of the data",
    TOKENIZER: "the tokenizer",
    BASE: "the base model",
    "checkpoint": "the checkpoint at model.path",
}


def data_digests(data: FederatedData) -> dict[str, str]:
    """Return digests of the rows as the model gets them, their division among clients and tests, labels, tokenizer."""
    splits = [*data.clients, data.test, *([] if data.validation is None else [data.validation])]
    tables = {id(split.table): split.table for split in splits}
    found = {
        ROWS: _digest(part for table in tables.values() for part in _parts(table)),
        DEALT: _digest([len(data.clients), *(split.rows for split in splits)]),
        LABELS: _digest([list(data.label_names)]),
    }
    if isinstance(data.test.table, InstructionTable):  # it decodes answers; other rows are tokens already
        found[TOKENIZER] = _digest([_described(data.test.table.tokenizer)])
    return found


def model_digest(model: nn.Module) -> str:
    """Return a digest of a model's class and of the names, types and bits of its weights and buffers."""
    parts: list[Any] = [type(model).__name__]
    for name, value in model.state_dict().items():
        parts += _held(name, value)
    return _digest(parts)


def _held(name: str, value: Any) -> list[Any]:
    """Return a value with its name; of a tensor that is made of others, as torchao's are, these with theirs."""
    if not isinstance(value, Tensor) or not hasattr(value, "__tensor_flatten__"):
        return [name, value]
    names, _ = value.__tensor_flatten__()
    parts: list[Any] = [name, type(value).__name__, str(value.dtype), [*value.shape]]
    return parts + [part for inner in names for part in _held(inner, getattr(value, inner))]


def folder_digest(folder: Path) -> str:
    """Return a digest of the names and contents of all files in a folder."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return _digest([[name, digest_of(folder / name)] for name in names])


def input_digests(data: FederatedData, model: nn.Module) -> dict[str, str]:
    """Return the digests of the data and of the base model of a run."""
    return {**data_digests(data), BASE: model_digest(model)}


def check_same(before: Mapping[str, str], now: Mapping[str, str], what: str) -> None:
    """Raise FedError if an input that both have differs; `what` is what began with `before`.

    >>> check_same({"rows": "a"}, {"rows": "a", "base model": "b"}, "the run")
    """
    for name, value in before.items():
        if now.get(name, value) != value:
            raise FedError(
                f"{what} began with other inputs: {CALLED.get(name, name)} changed since; put back what was there "
                "then, or start anew"
            )


def _parts(table: Table) -> list[Any]:
    if isinstance(table, DenseTable):
        return [*_named(table.inputs), table.labels]
    if isinstance(table, TextTable):
        return [*_named(table.tokens), table.labels, table.pad]
    if isinstance(table, InstructionTable):
        answers = [list(each) for each in table.answers]
        return [*_tokens(table.tokens), table.prompt_lengths, answers, table.max_new_tokens, table.most_generated]
    raise TypeError(f"a {type(table).__name__} is no table of rows")


def _named(values: Mapping[str, Tensor | Sequences]) -> list[Any]:
    return [part for name, value in values.items() for part in (name, *_tokens(value))]


def _tokens(value: Tensor | Sequences) -> list[Tensor]:
    return [value.values, value.offsets] if isinstance(value, Sequences) else [value]


def _described(tokenizer: Any) -> Any:
    """Return what a tokenizer decodes by: how it encodes is seen in the rows."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if fast is None else json.loads(fast.to_str()).get("decoder")
    cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    return [decoder, sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids), cleans]


def _digest(parts: Iterable[Any]) -> str:
    """Return the digest of tensors, on any device, and values for JSON, each with its type and size before it."""
    state = new_digest()
    for part in parts:
        if isinstance(part, Tensor):
            values = part.detach().cpu().contiguous()
            state.update(f"tensor {values.dtype} {tuple(values.shape)}\n".encode())
            state.update(values.reshape(-1).view(torch.uint8).numpy().data)
        else:
            text = json.dumps(part).encode()
            state.update(b"value %d\n" % len(text) + text)
    return state.hexdigest()
