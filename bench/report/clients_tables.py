"""The table of the results of `python -m bench.clients`."""

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench.harness.records import ResultsError
from bench.report.markdown import commit_text, markdown_table, versions_text

KIND = "clients"
MIB = 2**20
DISTURBED = 1.2  # wall-clock seconds divided by processor seconds of one busy thread
HEADER = (
    "clients",
    "a round",
    "kept on",
    "trained",
    "s a round",
    "CPU s a round",
    "CPU s a client drawn",
    "tensors, MiB",
    "process, MiB",
    "kept, MiB",
)


def clients_markdown(path: Path) -> str:
    """Return the measured points as Markdown; raise ResultsError if the file lacks a field."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    try:
        return f"{_conditions(saved)}\n\n{_table(saved['points'])}\n\n{_growth(saved['points'])}\n"
    except KeyError as error:
        raise ResultsError(
            f"{path} has no {error.args[0]!r}; `python -m bench.clients` of this version saves it"
        ) from None


def _conditions(saved: dict[str, Any]) -> str:
    machine = saved["machine"]
    versions, commit = versions_text(machine["versions"]), commit_text(saved["commit"])
    settings = " ".join(saved["settings"])
    return (
        f"{machine['device_name']}, one thread; {versions}; {commit}, {saved['date'][:10]}. "
        f"The preset `digits` with `{settings}`, after all clients have taken part once. Medians over rounds; "
        "*tensors* are all that live between two rounds, *process* the most memory the process ever took, *kept* what "
        f"all clients keep between rounds.{_disturbed(saved['points'])}"
    )


def _disturbed(points: list[dict[str, Any]]) -> str:
    """Return a note if the process did not have the processor all the time."""
    waited = max(point["seconds_per_round"] / point["cpu_seconds_per_round"] for point in points)
    if waited < DISTURBED:
        return ""
    return " The machine had other work meanwhile: the processor's seconds (CPU s) count, the clock's do not."


def _table(points: list[dict[str, Any]]) -> str:
    rows = [
        (
            f"{point['clients']:,}",
            str(point["per_round"]),
            point["kept"],
            {"sequential": "one by one", "cohort": "in cohorts"}[point["execution"]],
            f"{point['seconds_per_round']:.2f}",
            f"{point['cpu_seconds_per_round']:.2f}",
            f"{point['cpu_seconds_per_round'] / point['per_round']:.3f}",
            f"{point['tensor_bytes'] / MIB:.1f}",
            f"{point['process_bytes'] / MIB:.0f}",
            f"{point['kept_bytes'] / MIB:.0f}",
        )
        for point in points
    ]
    return markdown_table(HEADER, rows)


def _growth(points: list[dict[str, Any]]) -> str:
    """Return the memory of one more client, on disk and in memory, for the number drawn with most measured counts."""
    lines = []
    for kept, execution in dict.fromkeys((point["kept"], point["execution"]) for point in points):
        alike = [point for point in points if (point["kept"], point["execution"]) == (kept, execution)]
        drawn = min(point["per_round"] for point in alike)
        same = [point for point in alike if point["per_round"] == drawn]
        few, many = (chosen(same, key=itemgetter("clients")) for chosen in (min, max))
        if few is not many:
            more = many["clients"] - few["clients"]
            tensors, process = ((many[name] - few[name]) / more / 1024 for name in ("tensor_bytes", "process_bytes"))
            keeps = many["kept_bytes"] / many["clients"] / 1024
            lines.append(
                f"From {few['clients']:,} to {many['clients']:,} clients each client more costs {tensors:.2f} KiB of "
                f"tensors (the numbers of its rows) and {process:.2f} KiB of the process, and keeps {keeps:.0f} KiB on "
                f"{kept}."
            )
    return "\n".join(lines)
