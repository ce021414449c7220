"""Saved figures of training steps, from what the suites save or what `python -m bench.gpu` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.records import SIMULATION, Record, holds_records, load_records
from bench.results import ResultsError

NEEDED = ("model", "cohort", "batch", "length", "dtype", "provider", "status")
COMMAND = "pytest bench --benchmark-only -k simulation --benchmark-json="


@dataclass(frozen=True)
class Setting:
    """What all cohort sizes of a curve share: the model, and each client's batch."""

    model: str
    batch: int
    length: int
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.model}, {self.batch}×{self.length}"


@dataclass(frozen=True)
class SimulationRun:
    """A run: its records, and what they were made with. `commit` ends in "+" where files differed from it."""

    records: tuple[Record, ...]
    device_name: str
    threads: int | None
    versions: Mapping[str, Any]
    commit: str
    date: str

    def by_setting(self) -> dict[Setting, dict[int, dict[str, Record]]]:
        """Return the records by setting, cohort size and provider, in the order measured, sizes ascending."""
        found: dict[Setting, dict[int, dict[str, Record]]] = {}
        for record in self.records:
            setting = Setting(record["model"], record["batch"], record["length"], record["dtype"])
            found.setdefault(setting, {}).setdefault(record["cohort"], {})[record["provider"]] = record
        return {setting: dict(sorted(cohorts.items())) for setting, cohorts in found.items()}

    def providers(self) -> list[str]:
        """Return the providers, in the order measured."""
        return list(dict.fromkeys(record["provider"] for record in self.records))


def simulated(records: Sequence[Record]) -> tuple[Record, ...]:
    """Return those of some records that are of training steps."""
    return tuple(record for record in records if record.get("op") == SIMULATION)


def run_of_device(meta: Mapping[str, Any], records: Sequence[Record]) -> SimulationRun | None:
    """Return the training steps among a device's records, or None where there are none."""
    own = simulated(records)
    if not own:
        return None
    commit = meta.get("commit") or "unknown"
    return SimulationRun(own, meta["device_name"], None, meta["versions"], commit, meta["date"])


def load_simulation(path: Path) -> SimulationRun:
    """Read a file's training steps; raises ResultsError naming the file and what is missing."""
    if not path.is_file():
        raise ResultsError(f"{path} does not exist; `{COMMAND}{path}` writes it")
    run = run_of_device(*load_records(path)) if holds_records(path) else _run_of_suites(path)
    if run is None:
        raise ResultsError(f"{path} holds no training steps; `{COMMAND}{path}` measures them")
    for record in run.records:
        missing = [name for name in NEEDED if name not in record]
        if missing:
            raise ResultsError(f"{path}: a training step has no {missing[0]!r}; it was saved by another version")
    return run


def holds_simulation_alone(path: Path) -> bool:
    """Say whether a file of the suites holds training steps and nothing else."""
    try:
        benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        return {item["extra_info"]["op"] for item in benchmarks} == {SIMULATION}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _run_of_suites(path: Path) -> SimulationRun | None:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        items = [item["extra_info"] for item in saved["benchmarks"]]
        own = simulated([*items, *saved["not_available"]])
        if not own:
            return None
        machine, commit = saved["machine_info"], saved["commit_info"]
        name = str(commit["id"]) + ("+" if commit.get("dirty") else "")
        return SimulationRun(
            own, machine["device_name"], machine["threads"], machine["versions"], name, saved["datetime"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is not what the suites save ({type(error).__name__}: {error})") from error
