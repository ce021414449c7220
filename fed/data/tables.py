"""Tables that hold all rows of a data set once, and splits, which are views of some of their rows by index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

IGNORED = -100  # the label that cross-entropy ignores, in torch and in transformers


class Table(Protocol):
    """All rows of a data set. Arguments `rows` are int64 indices on the CPU; the tensors of a batch are on `device`."""

    @property
    def device(self) -> torch.device:
        """The device that batches are on."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the model's keyword arguments for `rows` (b,), `labels` among them."""

    def lengths(self, rows: Tensor) -> Tensor:
        """Return the number of tokens of each of `rows`, (b,) int64 on the CPU; 1 if rows have no tokens."""

    def counted(self, rows: Tensor) -> Tensor | None:
        """Return the positions of `batch(rows)` that predict a token of an answer, or None if rows have one label.

        They are the numbers row·L + column, (T,) int64 on the CPU, ascending.
        """

    def to(self, device: torch.device) -> Self:
        """Return the table on another device."""


@dataclass(frozen=True)
class DenseTable:
    """Rows of equal shape: `inputs` are the model's keyword arguments, each (n, …), and `labels` are (n,) int64."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    @property
    def device(self) -> torch.device:
        """The device that the rows are on."""
        return self.labels.device

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return every input (b, …) and `labels` (b,)."""
        rows = rows.to(self.device, non_blocking=True)
        return {name: values[rows] for name, values in self.inputs.items()} | {"labels": self.labels[rows]}

    def lengths(self, rows: Tensor) -> Tensor:
        """Return ones, (b,), because these rows are not padded."""
        return torch.ones(len(rows), dtype=torch.int64)

    def counted(self, rows: Tensor) -> None:
        """Return None, because these rows have one label each."""
        return

    def to(self, device: torch.device) -> DenseTable:
        """Return the table on another device."""
        return DenseTable({name: values.to(device) for name, values in self.inputs.items()}, self.labels.to(device))


@dataclass(frozen=True)
class Sequences:
    """Token sequences, concatenated without padding: row i is `values[offsets[i] : offsets[i + 1]]`.

    values: (total,) int32.  offsets: (n + 1,) int64, always on the CPU, so that the width of a batch is known without
    waiting for a device.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Sequences:
        """Concatenate sequences of at least one token each."""
        ends = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64).cumsum(0)
        values = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32)
        return cls(values, torch.cat([ends.new_zeros(1), ends]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, rows: Tensor) -> Tensor:
        """Return the number of tokens of each of `rows`, (b,) int64 on the CPU."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def padded(self, rows: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """Return tokens (b, L) int64, padded on the right with `fill`, and a mask (b, L) bool, False for padding.

        L is the length of the longest of these rows.
        """
        lengths, device = self.lengths(rows), self.values.device
        columns = torch.arange(int(lengths.max()), device=device)  # (L,)
        inside = columns < lengths.to(device, non_blocking=True)[:, None]  # (b, L)
        starts = self.offsets[rows].to(device, non_blocking=True)
        positions = (starts[:, None] + columns).clamp_(max=len(self.values) - 1)  # (b, L)
        return torch.where(inside, self.values[positions].long(), fill), inside

    def to(self, device: torch.device) -> Sequences:
        """Return the sequences with their tokens on another device."""
        return Sequences(self.values.to(device), self.offsets)


@dataclass(frozen=True)
class TextTable:
    """Texts for classification: `tokens` by the names of the model's arguments, and `labels`, (n,) int64.

    `input_ids` are padded with `pad`, other arguments such as `token_type_ids` with 0.
    """

    tokens: Mapping[str, Sequences]
    labels: Tensor
    pad: int

    @property
    def device(self) -> torch.device:
        """The device that the tokens are on."""
        return self.labels.device

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return tokens and `attention_mask`, (b, L) int64 with L the longest of these rows, and `labels` (b,)."""
        batch = {}
        for name, sequences in self.tokens.items():
            batch[name], inside = sequences.padded(rows, self.pad if name == "input_ids" else 0)
        return batch | {"attention_mask": inside.long(), "labels": self.labels[rows.to(self.device, non_blocking=True)]}

    def lengths(self, rows: Tensor) -> Tensor:
        """Return the number of tokens of each of `rows`, (b,) int64 on the CPU."""
        return self.tokens["input_ids"].lengths(rows)

    def counted(self, rows: Tensor) -> None:
        """Return None, because these rows have one label each."""
        return

    def to(self, device: torch.device) -> TextTable:
        """Return the table on another device."""
        tokens = {name: sequences.to(device) for name, sequences in self.tokens.items()}
        return TextTable(tokens, self.labels.to(device), self.pad)


@dataclass(frozen=True)
class InstructionTable:
    """Prompts and their answers, for a causal language model.

    tokens: the tokens of prompt, answer and end token of every row.  prompt_lengths: (n,) int64 on the CPU, the number
    of prompt tokens of each row.  answers: the right answers of every row, the first of which is the one in `tokens`.
    tokenizer: the model's tokenizer, for decoding generated answers.  max_new_tokens: the most tokens to generate.
    most_generated: the most rows of a split to generate answers for in evaluation; 0: all.
    """

    tokens: Sequences
    prompt_lengths: Tensor
    answers: Sequence[Sequence[str]] = field(repr=False)
    tokenizer: Any
    max_new_tokens: int
    most_generated: int = 0

    @property
    def device(self) -> torch.device:
        """The device that the tokens are on."""
        return self.tokens.values.device

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each (b, L) int64, padded on the right.

        Labels are the tokens of the answer and the end token, and -100 elsewhere, so that prompts do not count in the
        loss.
        """
        input_ids, inside = self.tokens.padded(rows, self.tokenizer.pad_token_id)
        prompts = self.prompt_lengths[rows].to(self.device, non_blocking=True)
        answered = inside & (torch.arange(input_ids.shape[1], device=self.device) >= prompts[:, None])  # (b, L)
        return {
            "input_ids": input_ids,
            "attention_mask": inside.long(),
            "labels": torch.where(answered, input_ids, IGNORED),
        }

    def packed(self, rows: Tensor) -> dict[str, Tensor]:
        """Return `rows` in one sequence without padding: `input_ids`, `position_ids` and `labels`, (1, Σ L_i) int64.

        Positions begin at 0 in each row, which tells models that it is another text. Labels are the tokens; which of
        them count is `packed_counted`.
        """
        lengths = self.lengths(rows)
        ends = lengths.cumsum(0)
        within = torch.arange(int(lengths.sum())) - (ends - lengths).repeat_interleave(lengths)
        places = (self.tokens.offsets[rows].repeat_interleave(lengths) + within).to(self.device, non_blocking=True)
        tokens = self.tokens.values[places].long()[None]
        return {
            "input_ids": tokens,
            "position_ids": within[None].to(self.device, non_blocking=True),
            "labels": tokens,
        }

    def packed_counted(self, rows: Tensor) -> Tensor:
        """Return the positions of `packed(rows)` before each answer token, (T,) int64 on the CPU, ascending."""
        lengths, counted = self.lengths(rows), self.counted(rows)
        width = int(lengths.max())
        row = counted // width
        return counted - row * width + (lengths.cumsum(0) - lengths)[row]

    def prompts(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the prompts only, `input_ids` and `attention_mask` (b, L) int64, padded on the left for generation."""
        input_ids, _ = self.tokens.padded(rows, self.tokenizer.pad_token_id)
        lengths = self.prompt_lengths[rows]
        width = int(lengths.max())
        lengths = lengths.to(self.device, non_blocking=True)
        columns = torch.arange(width, device=self.device) - (width - lengths[:, None])  # (b, L), negative: padding
        shifted = input_ids.gather(1, columns.clamp(min=0))
        inside = columns >= 0
        return {"input_ids": torch.where(inside, shifted, self.tokenizer.pad_token_id), "attention_mask": inside.long()}

    def lengths(self, rows: Tensor) -> Tensor:
        """Return the number of tokens of each of `rows`, (b,) int64 on the CPU."""
        return self.tokens.lengths(rows)

    def counted(self, rows: Tensor) -> Tensor:
        """Return row·L + column of the positions of `batch(rows)` before each answer token, (T,) int64 on the CPU."""
        lengths, prompts = self.lengths(rows), self.prompt_lengths[rows]
        first = prompts.clamp(min=1) - 1  # nothing predicts a row's first token
        counts = (lengths - 1 - first).clamp(min=0)
        begun = counts.cumsum(0) - counts
        starts = torch.arange(len(rows)) * int(lengths.max()) + first - begun
        return torch.arange(int(counts.sum())) + starts.repeat_interleave(counts)

    def to(self, device: torch.device) -> InstructionTable:
        """Return the table on another device."""
        return replace(self, tokens=self.tokens.to(device))


@dataclass(frozen=True)
class Split:
    """Some rows of a table, by their indices `rows` (n,) int64 on the CPU; splits of one table share its memory."""

    table: Table
    rows: Tensor

    @classmethod
    def whole(cls, table: Table) -> Split:
        """Return a split of all rows of a table."""
        return cls(table, torch.arange(len(table)))

    @classmethod
    def joined(cls, splits: Sequence[Split]) -> Split:
        """Return a split of the rows of all `splits`, one after the other; all must be views of one table."""
        table = splits[0].table
        if any(split.table is not table for split in splits):
            raise ValueError("splits of different tables cannot be joined")
        return cls(table, torch.cat([split.rows for split in splits]))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the model's keyword arguments for `rows`, int64 indices into this split, `labels` among them."""
        return self.table.batch(self.rows[rows])

    def lengths(self, rows: Tensor) -> Tensor:
        """Return the number of tokens of each of `rows`, (b,) int64 on the CPU."""
        return self.table.lengths(self.rows[rows])

    def counted(self, rows: Tensor) -> Tensor | None:
        """Return the positions of `batch(rows)` that predict a token of an answer; see `Table.counted`."""
        return self.table.counted(self.rows[rows])

    def longest(self, count: int) -> Split:
        """Return a split of the `count` rows that have most tokens, or of all if there are fewer, longest first."""
        order = self.lengths(torch.arange(len(self))).argsort(descending=True, stable=True)
        return Split(self.table, self.rows[order[:count]])

    def batches(self, most_rows: int, most_tokens: int, lengths: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the indices of batches of all rows, longest rows first.

        A batch has at most `most_rows` rows and, padding included, `most_tokens` tokens. A row longer than that has a
        batch of its own. Rows of equal length keep their order. `lengths` (n,) are the rows' numbers of tokens, if not
        those of `Split.lengths`.
        """
        own = self.lengths(torch.arange(len(self))) if lengths is None else lengths
        lengths, order = own.sort(descending=True, stable=True)
        first = 0
        while first < len(self):
            size = max(1, min(most_rows, most_tokens // int(lengths[first])))
            yield order[first : first + size]
            first += size
