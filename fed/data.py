"""The data of a run, in memory: handwritten digits or a JSONL file, split into clients and a test set."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fed.errors import FedError
from fed.partition import Array, partition_dirichlet, split_stratified
from fed.samples import DenseTable, Sequences, Split, Table, TextTable
from fed.streams import seed_of

if TYPE_CHECKING:
    from fed.config import RunConfig

_DIGIT_MAX = 16.0  # grey levels of scikit-learn's digits


@dataclass(frozen=True)
class FederatedData:
    """What a run trains and tests on; no row is in two of them, but for `undisturbed`.

    clients: the shifted training rows of each client.  test: held-out rows, shifted the same way.
    pretrain: undisturbed rows the embedded base is trained on.  undisturbed: the test rows before the shift.
    Both are None for text.  validation: held-out rows to choose settings by; None where none are set aside.
    """

    clients: tuple[Split, ...]
    test: Split
    pretrain: Split | None
    undisturbed: Split | None
    label_names: tuple[str, ...]
    validation: Split | None = None

    def to(self, device: torch.device) -> FederatedData:
        """Return the data with the clients' and the held-out rows on a device: every table goes there once."""
        moved: dict[int, Table] = {}

        def move(split: Split) -> Split:
            key = id(split.table)
            if key not in moved:
                moved[key] = split.table.to(device)
            return Split(moved[key], split.rows)

        return replace(
            self,
            clients=tuple(map(move, self.clients)),
            test=move(self.test),
            validation=move(self.validation) if self.validation is not None else None,
        )


def load(config: RunConfig) -> FederatedData:
    """Load, split and partition the data a configuration names; FedError where it cannot be had."""
    return _digits(config) if config.data.name == "digits" else _jsonl(config)


def shift_images(images: Tensor, shift: Literal["rotate90", "rotate180", "invert", "none"]) -> Tensor:
    """Disturb images (n, 1, H, W) with grey levels in [-1, 1]: turn them to the left, or make a negative."""
    if shift == "invert":
        return -images
    return torch.rot90(images, {"none": 0, "rotate90": 1, "rotate180": 2}[shift], dims=(-2, -1))


def _digits(config: RunConfig) -> FederatedData:
    """1,797 images of 8×8, grey levels scaled to [-1, 1]: pretrain / test / clients, stratified, disjoint."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels: Array = digits.target.astype(np.int64)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (2 / _DIGIT_MAX) - 1
    pretrain, rest = split_stratified(labels, config.data.pretrain_fraction, _rng(config, "pretrain"))
    of_the_rest = config.data.test_fraction / (1 - config.data.pretrain_fraction)
    test, pool = split_stratified(labels[rest], of_the_rest, _rng(config, "test"))
    plain = DenseTable({"pixel_values": images}, torch.from_numpy(labels))
    shifted = DenseTable({"pixel_values": shift_images(images, config.data.shift)}, plain.labels)
    return FederatedData(
        clients=_deal(config, shifted, labels, rest[pool]),
        test=_view(shifted, rest[test]),
        pretrain=_view(plain, pretrain),
        undisturbed=_view(plain, rest[test]),
        label_names=tuple(str(name) for name in digits.target_names),
    )


def _jsonl(config: RunConfig) -> FederatedData:
    """Rows of a JSONL file, tokenised with the checkpoint's own tokenizer: test / clients, stratified."""
    from fed.models import load_tokenizer, saved_label_names

    texts, found = read_jsonl(config)
    names = saved_label_names(config)
    if set(names) != set(found):
        names = tuple(sorted(set(found)))
    if len(names) < 2:
        raise FedError(
            f"data.label is {config.data.label!r}: the only label in {config.data.path} is {names[0]!r}; "
            "there should be two or more"
        )
    numbers = {name: number for number, name in enumerate(names)}
    labels: Array = np.array([numbers[name] for name in found])
    test, pool = split_stratified(labels, config.data.test_fraction, _rng(config, "test"))
    if len(test) == 0:
        raise FedError(
            f"data.test_fraction is {config.data.test_fraction}: {len(labels)} rows of {len(names)} labels "
            "leave none to test on; it should be larger, or data.label a column whose values repeat"
        )
    tokenizer = load_tokenizer(config)
    tokens = _tokenise(tokenizer, texts, config.data.max_length)
    everything = TextTable(tokens, torch.from_numpy(labels), tokenizer.pad_token_id)
    return FederatedData(
        clients=_deal(config, everything, labels, pool),
        test=_view(everything, test),
        pretrain=None,
        undisturbed=None,
        label_names=names,
    )


def read_jsonl(config: RunConfig) -> tuple[list[str], list[str]]:
    """Return the texts and labels of the file at `data.path`, one object a line, blank lines left out.

    Labels may be strings, integers or booleans and come back as strings. Raises FedError naming the line.
    """
    path = Path(config.data.path or "")
    texts: list[str] = []
    labels: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise FedError(f"data.path is {str(path)!r}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FedError(f"data.path is {str(path)!r}: cannot read it as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text, label = _row(line, config.data.text, config.data.label, f"{path} line {number}")
        texts.append(text)
        labels.append(label)
    if not texts:
        raise FedError(f"data.path is {str(path)!r}: the file holds no rows")
    return texts, labels


def _row(line: str, text_column: str, label_column: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FedError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise FedError(f"{where}: holds {row!r:.40}; every line should be a JSON object")
    for key, column in (("data.text", text_column), ("data.label", label_column)):
        if column not in row:
            raise FedError(f"{where}: {key} is {column!r}; the columns there are {', '.join(row)}")
    text, label = row[text_column], row[label_column]
    if not isinstance(text, str):
        raise FedError(f"{where}: data.text {text_column!r} holds {text!r:.40}; it should be a string")
    if not isinstance(label, str | int):
        raise FedError(f"{where}: data.label {label_column!r} holds {label!r:.40}; it should be a string or an integer")
    return text, str(label)


def _tokenise(tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Sequences]:
    """Token sequences cut at `max_length` tokens."""
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)
    return {name: Sequences.of(values) for name, values in encoded.items()}


def _deal(config: RunConfig, table: Table, labels: Array, pool: Array) -> tuple[Split, ...]:
    clients = config.clients
    parts = partition_dirichlet(labels[pool], clients.count, clients.dirichlet_alpha, _rng(config, "partition"))
    return tuple(_view(table, pool[part]) for part in parts)


def _view(table: Table, rows: Array) -> Split:
    return Split(table, torch.from_numpy(rows))


def _rng(config: RunConfig, purpose: str) -> np.random.Generator:
    return np.random.default_rng(seed_of(config.seed, purpose))
