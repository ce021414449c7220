"""The result of a command-line call, and its files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fed.simulation.simulate
from tests.support.tiny_federation import MEASURED

# The fields of a run's row, in order.
FIELDS = [
    *("round", "accuracy", "loss", "init_noise", "agg_noise", "agg_noise_module"),
    *("factor_noise", "factor_noise_A", "factor_noise_B", "upload_bytes", "download_bytes"),
    *("trainable_parameters", "optimizer_bytes", "activation_bytes", "fold_seconds", "train_seconds"),
    *("tokens_per_second", "padding_share"),
    *("peak_memory_bytes", "clients_per_pass"),
    *("client_accuracy", "worst_accuracy", "clients", "steps", "skipped", "faults", "clipped", "late"),
]


class StoppedError(Exception):
    """What ends a run in the middle."""


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Call = Callable[..., Outcome]


def outcome_of(main: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Call a command line in this process."""
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return Outcome(exit_.value.code or 0, captured.out, captured.err)


def assert_refused(outcome: Outcome, message: str) -> None:
    """Assert that a call failed with one line of error that matches the message."""
    assert outcome.status == 2
    assert re.fullmatch(r"error: .+\n", outcome.err), outcome.err
    assert re.search(message, outcome.err), outcome.err


def failing(error: BaseException, after_rows: int) -> Callable[..., object]:
    """Return a `simulate` that raises `error` after `after_rows` rows of all runs together; 0: at once."""
    simulate, seen = fed.simulation.simulate.simulate, []

    def fail(*arguments: object, **options: object) -> object:
        *settings, on_round, on_event = arguments

        def watch(row: dict) -> None:
            on_round(row)
            seen.append(row)
            if len(seen) == after_rows:
                raise error

        if after_rows == 0:
            raise error
        return simulate(*settings, watch, on_event, **options)

    return fail


def rows_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def timeless(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without the measured fields, which differ between runs."""
    return [{key: value for key, value in row.items() if not key.endswith(MEASURED)} for row in rows]


def without_times(directory: Path) -> list[dict[str, Any]]:
    return timeless(rows_of(directory))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the rows and what notes the directory's own name, and without digests of these."""
    skipped = ("rounds.jsonl", "adapter_config.json", ".lock")
    files = (path for path in directory.rglob("*") if path.is_file() and path.name not in skipped)
    return {str(path.relative_to(directory)): _timeless_bytes(path) for path in files}


def _timeless_bytes(path: Path) -> bytes:
    if path.name not in ("state.json", "finished.json"):
        return path.read_bytes()
    facts = json.loads(path.read_text())["facts"]
    del facts["rows"]
    if "files" in facts:
        facts["files"].pop("adapter/adapter_config.json", None)
    return json.dumps(facts).encode()
