"""Building tables from rows of text: for classification, or of prompts and their answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from fed.config import CHAT, RunConfig
from fed.data.labels import order_classes, quoted
from fed.data.partition import Array
from fed.data.pretrained import require_positions, saved_label_names
from fed.data.rows import Rows
from fed.data.tables import InstructionTable, Table, TextTable
from fed.data.tokenization import Stage, chat_tokens, instruction_tokens, text_tokens
from fed.errors import FedError

_COLUMN = re.compile(r"\{([^{}\n]+)\}")


def make_labels(
    config: RunConfig, rows: Rows, on_event: Callable[[str], object] | None = None
) -> tuple[Array, tuple[str, ...]]:
    """Return the label number of every row, (n,), and the label names in the order of their numbers.

    Labels may be strings, integers or booleans. They are numbered as in the checkpoint's head, or else as in the data
    source, if one of them has these labels, and else in sorted order, integers as numbers; `fed.data.labels` says when
    a head has them. Labels that only the head has are among the names, and `on_event` receives a line that says so.
    Raises FedError if there are fewer than two labels.
    """
    column = config.data.label
    found = rows.column("data.label", column, (str, int))
    if rows.label_names is not None:
        found = [_name(rows, value, index) for index, value in enumerate(found)]
    found = [str(value) for value in found]
    there = set(found)
    if len(there) < 2:
        raise FedError(
            f"data.label is {column!r}: the only label in {config.data.title} is {found[0]!r}; "
            "there should be two or more"
        )
    head = saved_label_names(config)
    names = order_classes(there, head, rows.label_names or ())
    unused = [name for name in names if name not in there]
    if unused and len(names) == len(head) and on_event is not None:
        on_event(f"the checkpoint's head has {len(names)} labels; no row has {quoted(unused)}")
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[name] for name in found], dtype=np.int64), names


def _name(rows: Rows, value: int, index: int) -> str:
    names = rows.label_names or ()
    if not 0 <= value < len(names):
        raise FedError(f"{rows.places[index]}: its label is {value}, so it has none; another split may have labels")
    return names[value]


def classification_table(
    config: RunConfig, rows: Rows, labels: Array, on_event: Callable[[str], object], stage: Stage | None
) -> Table:
    """Return a table of the texts in column `data.text`, paired with those in `data.text_pair` if it is set."""
    texts = rows.column("data.text", config.data.text)
    pairs = None
    if config.data.text_pair is not None:
        pairs = rows.column("data.text_pair", config.data.text_pair)
    tokenizer, tokens = text_tokens(config, texts, pairs, on_event, stage)
    return TextTable(tokens, torch.from_numpy(labels), tokenizer.pad_token_id)


def instruction_table(
    config: RunConfig, rows: Rows, on_event: Callable[[str], object], stage: Stage | None
) -> InstructionTable:
    """Return a table of filled-in prompts and of the answers in the column `data.output`.

    An answer is a string, an integer, or a list of strings, all of which are right; the first is used for training.
    """
    data = config.data
    require_positions(config)
    found = rows.column("data.output", data.output, (str, int, list))
    answers = [_answers(value, place, data.output) for value, place in zip(found, rows.places, strict=True)]
    first = [several[0] for several in answers]
    if data.prompt == CHAT:
        tokenizer, tokens, prompts, cut = chat_tokens(
            config, _messages(config, rows), [answer.strip() for answer in first], rows.places, on_event, stage
        )
    else:
        prompted = fill_in(data.prompt, rows)
        tokenizer, tokens, prompts, cut = instruction_tokens(config, prompted, first, on_event, stage)
    if cut:
        on_event(f"{cut} of {len(rows)} rows have more than data.max_length ({data.max_length}) tokens and are cut")
    return InstructionTable(tokens, prompts, answers, tokenizer, data.max_new_tokens, data.generated_rows)


def _messages(config: RunConfig, rows: Rows) -> list[tuple[str | None, str]]:
    """Return the system message of every row, None if there is none, and the user's message."""
    system, users = config.data.chat_system, fill_in(config.data.chat_user, rows, "data.chat_user")
    if _COLUMN.search(system):
        systems = fill_in(system, rows, "data.chat_system", may_be_empty=True)
        return [(own if own.strip() else None, user) for own, user in zip(systems, users, strict=True)]
    return [(system or None, user) for user in users]


def leave_out_unanswered(config: RunConfig, rows: Rows, on_event: Callable[[str], object]) -> Rows:
    """Return the rows with an answer in the column `data.output`; tell `on_event` how many others there are.

    An empty string, null or a list of such is no answer: there is nothing to learn from it and nothing to compare an
    answer with. In a list with others, empty ones are left out, which is said as well. Rows without the column stay, to
    be refused where it is read. Raises FedError if no training row or no row of the source's own test is left.
    """
    column = config.data.output
    left, kept, shortened = list(rows.rows), [], []
    for index, row in enumerate(rows.rows):
        value = row.get(column)
        several = value if isinstance(value, list) else [value]
        answers = [answer for answer in several if answer not in ("", None)]
        if column in row and not answers:
            continue
        kept.append(index)
        if column in row and len(answers) < len(several):
            left[index] = {**row, column: answers}
            shortened.append(index)
    answered = replace(rows, rows=left).take(kept)
    own_test = rows.first_test is not None
    for what, before, after in (
        ("training " if own_test else "", len(rows.training), len(answered.training)),
        ("test ", len(rows) - len(rows.training), len(answered) - len(answered.training)),
    ):
        if before and not after:
            raise FedError(f"data.output is {column!r}: none of the {before} {what}rows has an answer there")
    if shortened:
        on_event(
            f"{len(shortened)} of {len(rows)} rows list empty answers beside others, which are left out; the first is "
            f"{rows.places[shortened[0]]}"
        )
    if len(kept) < len(rows):
        first = next(index for index, other in enumerate([*kept, len(rows)]) if index != other)
        on_event(
            f"{len(rows) - len(kept)} of {len(rows)} rows have no answer in {column!r} and are left out; the first is "
            f"{rows.places[first]}"
        )
    return answered


def fill_in(prompt: str, rows: Rows, key: str = "data.prompt", may_be_empty: bool = False) -> list[str]:
    """Return the prompt of every row, with each {column} replaced by the row's value.

    A line whose columns are all empty is left out. Raises FedError, with `key` as the name of the setting, if the
    prompt names no column or one that no row has, a value is not a string, or, unless it `may_be_empty`, all columns of
    a row are empty.
    """
    columns = list(dict.fromkeys(_COLUMN.findall(prompt)))
    if not columns:
        raise FedError(f"{key} is {prompt!r}: it should name a column in braces, e.g. '{{instruction}}'")
    for column in columns:
        if not any(column in row for row in rows.rows):
            there = ", ".join(rows.rows[0])
            raise FedError(f"{key} names {{{column}}}; the columns of {rows.places[0]} are {there}")
    values = [rows.column(key, column, empty=True) for column in columns]
    return [
        _filled(prompt, dict(zip(columns, found, strict=True)), place, may_be_empty)
        for place, *found in zip(rows.places, *values, strict=True)
    ]


def _filled(prompt: str, values: dict[str, str | None], place: str, may_be_empty: bool) -> str:
    if not any(values.values()) and not may_be_empty:
        raise FedError(f"{place}: {', '.join(values)} are empty; a prompt needs one of them")
    lines = []
    for line in prompt.split("\n"):
        named = _COLUMN.findall(line)
        if not named or any(values[column] for column in named):
            lines.append(_COLUMN.sub(lambda match: values[match[1]] or "", line))
    return "\n".join(lines)


def _answers(value: str | int | list[object], place: str, column: str) -> tuple[str, ...]:
    several: Sequence[object] = value if isinstance(value, list) else [str(value)]
    if not several or not all(isinstance(answer, str) and answer for answer in several):
        raise FedError(f"{place}: data.output {column!r} holds {value!r:.40}; it should be a string that is not empty")
    return tuple(str(answer) for answer in several)
