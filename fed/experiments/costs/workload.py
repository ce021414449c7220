"""What a run computes on, as far as its costs depend on it: tokens in a row, rows of a client, rows to test on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fed.config import RunConfig
from fed.errors import FedError
from fed.models.shared_model import SharedModel
from fed.training.losses import client_losses

_DIGITS = 1797  # rows of scikit-learn's digits


@dataclass(frozen=True)
class Workload:
    """The rows of a run, all taken to be alike.

    `tokens` are a text's, 1 for images, whose patches the model itself makes; `answer` how many of them are the answer
    of an instruction. `client_rows` are a client's rows and `test_rows` those that the server evaluates on, of which
    `generated_rows` are answered with `new_tokens` tokens each. `labels` is the number of classes, None as the
    checkpoint says.
    """

    tokens: int
    answer: int
    client_rows: int
    test_rows: int
    generated_rows: int = 0
    new_tokens: int = 0
    labels: int | None = None

    def width(self, config: RunConfig) -> int:
        """Return the rows of a client's batch."""
        return min(config.train.batch_size, self.client_rows)


def workload(
    config: RunConfig,
    tokens: int | None = None,
    answer: int | None = None,
    client_rows: int | None = None,
    test_rows: int | None = None,
    labels: int | None = None,
) -> Workload:
    """Return the rows of a run, from its configuration where they are not given.

    A text has `data.max_length` tokens, of which, in an instruction, `data.max_new_tokens` are the answer. A client has
    `data.rows_per_client` rows, or an equal part of `data.train_rows` or of the digits, or else one batch.
    """
    data, clients = config.data, config.clients.count
    images, answers = data.name == "digits", data.task == "instruction"
    held = data.pretrain_fraction + data.test_fraction + data.validation_fraction
    pool = round(_DIGITS * (1 - held)) if images else 0
    pool = min(pool, data.train_rows) if images and data.train_rows else pool or data.train_rows
    if tokens is not None and images:
        raise FedError(f"--tokens is {tokens}: the rows of data.name = 'digits' are images of 16 patches")
    if tokens is not None and tokens > data.max_length:
        raise FedError(f"--tokens is {tokens}: it should be at most data.max_length ({data.max_length})")
    length = 1 if images else tokens or data.max_length
    if answer is not None and (not answers or answer >= length):
        raise FedError(
            f"--answer-tokens is {answer}: it goes with data.task = 'instruction', and should be below the tokens of a "
            f"row ({length})"
        )
    if client_rows is None:
        client_rows = data.rows_per_client or max(1, pool // clients) if pool or data.rows_per_client else None
    if client_rows is None and config.train.local_epochs:
        raise FedError("--rows is missing: with train.local_epochs a client's steps depend on its number of rows")
    tested = test_rows if test_rows is not None else data.test_rows or (round(_DIGITS * data.test_fraction) * images)
    generated = (min(tested, data.generated_rows) if data.generated_rows else tested) if answers else 0
    return Workload(
        tokens=length,
        answer=min(answer or data.max_new_tokens, length - 1) if answers else 0,
        client_rows=client_rows or config.train.batch_size,
        test_rows=tested,
        generated_rows=generated,
        new_tokens=data.max_new_tokens if answers else 0,
        labels=labels,
    )


@dataclass(frozen=True)
class EqualRows:
    """A table of `count` rows of the same shapes, as a client's costs need them; their values are all 0.

    `inputs` are the shapes of the model's inputs in one row, and their dtypes.
    """

    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    count: int
    length: int

    @classmethod
    def of(cls, model: Any, load: Workload, count: int) -> EqualRows:
        """Return rows for a classifier: images for a model of images, else texts."""
        settings = model.config
        if hasattr(settings, "image_size"):
            shape = (settings.num_channels, settings.image_size, settings.image_size)
            return cls({"pixel_values": (shape, torch.float32)}, count, 1)
        shapes = {"input_ids": ((load.tokens,), torch.int64), "attention_mask": ((load.tokens,), torch.int64)}
        return cls(shapes, count, load.tokens)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def __len__(self) -> int:
        return self.count

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs for as many rows, and their labels."""
        made = {name: torch.ones(len(rows), *shape, dtype=dtype) for name, (shape, dtype) in self.inputs.items()}
        return made | {"labels": torch.zeros(len(rows), dtype=torch.int64)}

    def lengths(self, rows: Tensor) -> Tensor:
        """Return the number of tokens of each of `rows`, (b,) int64."""
        return torch.full((len(rows),), self.length)

    def counted(self, rows: Tensor) -> None:
        """Return None: a row has one label."""
        return

    def to(self, device: torch.device) -> EqualRows:
        """Return the table itself, which is on no other device."""
        return self


def run_forward(shared: SharedModel, load: Workload, rows: int) -> Tensor:
    """Run the forward of a batch's loss in training mode, of a causal language model up to its last hidden states.

    Return the loss (1,), or the hidden states (rows, L, H).
    """
    model: Any = shared.model
    model.train()
    if load.answer:
        tokens = torch.ones(rows, load.tokens, dtype=torch.int64)
        decoder = model.get_decoder()
        hidden: Tensor = decoder(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)[0]
        return hidden
    return client_losses(model, EqualRows.of(model, load, rows).batch(torch.arange(rows)), [rows])
