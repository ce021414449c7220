"""Rows of text in files, and configurations that read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fed.config import RunConfig, parse

PETS = ["a small cat", "a big dog", "the cat sat", "the dog ran", "cat and dog", "one dog", "two cats", "no pets"]
PROMPT = "{instruction}\nInput: {input}\nOutput:\n"


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """Write one JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_config(path: Path | str, model: Path | str = "m", **changes: Any) -> RunConfig:
    """Return a configuration for a file: `changes` set keys of `[data]`, or replace a whole table by its name."""
    tables = {name: changes.pop(name) for name in ("clients", "train", "adapter") if name in changes}
    return parse(
        {
            "model": {"path": str(model)},
            "data": {"path": str(path), "max_length": 16, **changes},
            "clients": {"count": 2, "per_round": 2},
            **tables,
        },
        where="here",
    )


def instructions(count: int = 12) -> list[dict[str, str]]:
    """Return rows to answer: which of two animals a sentence names."""
    animals = ("cat", "dog")
    return [
        {
            "category": f"animals {number % 3}",
            "instruction": "Name the animal.",
            "input": f"{'a' if number % 2 else 'the'} {animals[number // 2 % 2]} {number}",
            "output": animals[number // 2 % 2],
        }
        for number in range(count)
    ]


def instruction_config(path: Path | str, model: Path | str = "m", **changes: Any) -> RunConfig:
    """Return a configuration for a file of such rows, dealt out evenly."""
    settings = {"task": "instruction", "prompt": PROMPT, "max_length": 64, "max_new_tokens": 4, "partition": "iid"}
    return text_config(path, model, **{**settings, **changes})
