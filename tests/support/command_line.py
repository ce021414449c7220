"""What a call of the command line gave, and what it left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.support.tiny_federation import MEASURED


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


def rows_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def without_times(directory: Path) -> list[dict]:
    """A run's rows without what is measured anew every time."""
    return [{key: value for key, value in row.items() if not key.endswith(MEASURED)} for row in rows_of(directory)]
