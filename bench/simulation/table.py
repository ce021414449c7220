"""The table of training steps for the README: one line a setting, at one size of the cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.simulation.cases import RANK
from bench.simulation.saved import Record, Setting, SimulationRun, load_simulation
from bench.tables import markdown_table

# Shown where it was measured; else the largest size there is.
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


def simulation_markdown(run: SimulationRun) -> str:
    """Return a run as Markdown: what it ran on and how to read it, then the table."""
    return f"{_conditions(run)} {reading(run)}\n\n{simulation_table(run)}\n"


def committed_simulation(path: Path) -> str:
    """Return what the README says of a committed file, or that there is none yet."""
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
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if version)
    threads = f", {run.threads} CPU threads" if run.threads else ""
    state = " with uncommitted changes" if run.commit.endswith("+") else ""
    return f"{run.device_name}{threads}; {versions}; commit {run.commit.rstrip('+')[:12]}{state}, {run.date[:10]}."
