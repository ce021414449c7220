"""The data of a run, in memory: handwritten digits or a JSONL file, split into clients and a test set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fed.errors import FedError
from fed.streams import seed_of

if TYPE_CHECKING:
    from fed.config import RunConfig

Array = np.ndarray[Any, np.dtype[np.int64]]

_FEWEST_ROWS = 2
_DIGIT_MAX = 16.0  # grey levels of scikit-learn's digits


@dataclass(frozen=True)
class Split:
    """Rows held in memory: `inputs` are the model's keyword arguments, each (n, …); `labels` (n,) int64."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the model's keyword arguments for `rows` (int64 indices), `labels` among them."""
        return {name: values[rows] for name, values in self.inputs.items()} | {"labels": self.labels[rows]}


@dataclass(frozen=True)
class FederatedData:
    """What a run trains and tests on; no row is in two of them, but for `undisturbed`.

    clients: the shifted training rows of each client.  test: held-out rows, shifted the same way.
    pretrain: undisturbed rows the embedded base is trained on.  undisturbed: the test rows before the shift.
    The last two are None for JSONL.
    """

    clients: tuple[Split, ...]
    test: Split
    pretrain: Split | None
    undisturbed: Split | None
    label_names: tuple[str, ...]


def load(config: RunConfig) -> FederatedData:
    """Load, split and partition the data a configuration names; FedError where it cannot be had."""
    return _digits(config) if config.data.name == "digits" else _jsonl(config)


def shift_images(images: Tensor, shift: Literal["rotate90", "rotate180", "invert", "none"]) -> Tensor:
    """Disturb images (n, 1, H, W) with grey levels in [-1, 1]: turn them to the left, or make a negative."""
    if shift == "invert":
        return -images
    return torch.rot90(images, {"none": 0, "rotate90": 1, "rotate180": 2}[shift], dims=(-2, -1))


def split_stratified(labels: Array, fraction: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return (taken, left), sorted row indices; of every label round(fraction · rows) rows are taken."""
    taken = [
        rng.permutation(rows := np.flatnonzero(labels == label))[: round(fraction * len(rows))]
        for label in np.unique(labels)
    ]
    chosen = np.sort(np.concatenate(taken))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def partition_dirichlet(
    labels: Array, clients: int, alpha: float | Literal["iid"], rng: np.random.Generator
) -> list[Array]:
    """Deal rows out to clients with label skew and return each client's sorted row indices.

    For every label, shares ~ Dirichlet(alpha · 1) cut its shuffled rows into one piece a client; "iid" deals
    all rows out evenly. A client left with fewer than 2 rows then takes some from the largest, one at a time.
    Raises FedError where there are fewer than 2 rows a client.
    """
    if len(labels) < _FEWEST_ROWS * clients:
        raise FedError(
            f"clients.count is {clients}: {len(labels)} training rows allow at most "
            f"{len(labels) // _FEWEST_ROWS} clients of {_FEWEST_ROWS} rows"
        )
    if alpha == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(piece.tolist())
    for part in parts:
        while len(part) < _FEWEST_ROWS:
            part.append(max(parts, key=len).pop())
    return [np.sort(np.array(part)) for part in parts]


def _digits(config: RunConfig) -> FederatedData:
    """1,797 images of 8×8, grey levels scaled to [-1, 1]: pretrain / test / clients, stratified, disjoint."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels: Array = digits.target.astype(np.int64)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (2 / _DIGIT_MAX) - 1
    pretrain, rest = split_stratified(labels, config.data.pretrain_fraction, _rng(config, "pretrain"))
    of_the_rest = config.data.test_fraction / (1 - config.data.pretrain_fraction)
    test, pool = split_stratified(labels[rest], of_the_rest, _rng(config, "test"))
    plain = Split({"pixel_values": images}, torch.tensor(labels))
    shifted = Split({"pixel_values": shift_images(images, config.data.shift)}, plain.labels)
    return FederatedData(
        clients=_deal(config, shifted, rest[pool]),
        test=_take(shifted, rest[test]),
        pretrain=_take(plain, pretrain),
        undisturbed=_take(plain, rest[test]),
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
    everything = Split(_tokenise(load_tokenizer(config), texts, config.data.max_length), torch.tensor(labels))
    return FederatedData(
        clients=_deal(config, everything, pool),
        test=_take(everything, test),
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


def _tokenise(tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Tensor]:
    """Token tensors (n, L) int64, cut at `max_length` tokens and padded to the longest text."""
    return dict(tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))


def _deal(config: RunConfig, rows: Split, pool: Array) -> tuple[Split, ...]:
    clients = config.clients
    parts = partition_dirichlet(
        rows.labels.numpy()[pool], clients.count, clients.dirichlet_alpha, _rng(config, "partition")
    )
    return tuple(_take(rows, pool[part]) for part in parts)


def _take(rows: Split, indices: Array) -> Split:
    chosen = torch.from_numpy(indices)
    return Split({name: values[chosen] for name, values in rows.inputs.items()}, rows.labels[chosen])


def _rng(config: RunConfig, purpose: str) -> np.random.Generator:
    return np.random.default_rng(seed_of(config.seed, purpose))
