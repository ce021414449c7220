"""Run directories written by hand, for tests of their readers."""

from __future__ import annotations

import json
from pathlib import Path

from fed.config import RunConfig, write
from fed.files import digest
from fed.simulation.finished import mark
from fed.simulation.rows import RowSeal


def make_row(number: int, **changes: object) -> dict:
    row = {
        "round": number,
        "accuracy": 0.1 * (number + 1),
        "loss": 2.0 - 0.1 * number,
        "init_noise": 1e-6 if number > 1 else 0.0 if number else None,
        "agg_noise": 0.5 if number else None,
        "upload_bytes": 1000 * number,
        "download_bytes": 3000 if number else 0,
        "train_seconds": 0.5,
        "clients": [1, 2],
        "skipped": [],
    }
    return row | changes


def make_run(directory: Path, rows: list[dict], config: RunConfig | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write(config or RunConfig(), directory / "config.toml")
    (directory / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def make_finished_run(directory: Path, rows: list[dict], config: RunConfig) -> Path:
    make_run(directory, rows, config)
    (directory / "adapter").mkdir()
    content = (directory / "rounds.jsonl").read_bytes()
    mark(directory, config, rows[-1]["round"], RowSeal(len(content), digest(content)), inputs={})
    return directory
