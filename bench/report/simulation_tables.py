"""Saved figures of training steps, by the suites or by `python -m bench.gpu`, and their table for documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.records import SIMULATION, Record, ResultsError, holds_records, load_records
from bench.report.markdown import commit_text, markdown_table, versions_text
from bench.report.suite_results import commit_name
from bench.simulation.cases import RANK

# The cohort size whose figures the table shows; where it was not measured, the largest that was.
COHORT = 10
OURS = "cohort"
NOT_MEASURED = """\
Many clients at once: not yet measured. `make bench-simulation` does it, in some minutes of an idle machine."""
NOTES = {
    "base": "*base* is the bare model on the cohort's whole batch, forward and backward to its first layer's input",
    "peft-loop": "*peft-loop* one PEFT model whose adapter and optimiser state are swapped from client to client",
    "vmap": "*vmap* `torch.func.vmap` over stacked adapters of that model",
    "sequential": "*sequential* the loop with this library's layers",
    "cohort": "*cohort* the simulator's cohort executor",
    "cohort-compiled": "*cohort-compiled* the same with `cohort_compile`, compiled before it is timed",
}

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
        machine, commit = saved["machine_info"], commit_name(saved["commit_info"])
        return SimulationRun(
            own, machine["device_name"], machine["threads"], machine["versions"], commit, saved["datetime"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is not what the suites save ({type(error).__name__}: {error})") from error


def simulation_markdown(run: SimulationRun) -> str:
    """Return a run as Markdown: what it ran on and how to read it, then the table."""
    return f"{_conditions(run)} {reading(run)}\n\n{simulation_table(run)}\n"


def committed_simulation(path: Path) -> str:
    """Return what is shown of a committed file, or that there is none yet."""
    return simulation_markdown(load_simulation(path)).strip() if path.is_file() else NOT_MEASURED


def simulation_table(run: SimulationRun) -> str:
    """Return the table alone."""
    names = run.providers()
    header = ["clients·steps/s", "clients", *names]
    if OURS in names:
        header.append(f"{OURS} ÷ peft-loop")
    rows = []
    for setting, cohorts in run.by_setting().items():
        size = COHORT if COHORT in cohorts else max(cohorts)
        rows.append(_row(setting, size, cohorts[size], names))
    return markdown_table(header, rows)


def _row(setting: Setting, size: int, records: Mapping[str, Record], names: Sequence[str]) -> list[str]:
    cells = [setting.label, str(size), *(_speed(records.get(name)) for name in names)]
    if OURS in names:
        ratio = records.get(OURS, {}).get("ratio_to_peft_loop")
        cells.append(f"{1 / ratio:.2f}" if ratio else "–")
    return cells


def _speed(record: Record | None) -> str:
    if record is None:
        return "–"
    if record["status"] != "timed":
        return str(record["status"])
    return f"{record['clients_steps_per_second']:.3g} ({1 / record['ratio_to_base']:.2f})"


def reading(run: SimulationRun) -> str:
    """Return how the table is to be read."""
    dtypes = ", ".join(dict.fromkeys(record["dtype"] for record in run.records))
    notes = "; ".join(NOTES[name] for name in run.providers() if name in NOTES)
    return (
        f"Clients trained one step in a second, {dtypes}: forward, backward, AdamW; R {RANK} on every linear layer, "
        "the head trained; a client's batch is rows × tokens. Medians of interleaved rounds, in brackets the share of "
        f"*base*'s speed: {notes}. Every client's gradients were held to PEFT's in float64 before anything was timed."
    )


def _conditions(run: SimulationRun) -> str:
    threads = f", {run.threads} CPU threads" if run.threads else ""
    versions, commit = versions_text(run.versions), commit_text(run.commit)
    return f"{run.device_name}{threads}; {versions}; {commit}, {run.date[:10]}."
