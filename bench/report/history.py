"""The history of benchmark runs: their ratios, tabulated and drawn over commits.

Absolute times change from day to day even on one machine; the ratio of two providers timed in turn in one run does not.
So only the ratios of a run are kept: `{"date", "commit", "device_name", "versions", "ratios": [{op, layer, m, k, n, r,
dtype, provider, ratio_to_base, ratio_to_peft}, …]}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.cases import OPS
from bench.harness.records import Record, ResultsError, write_text
from bench.report.markdown import markdown_table
from bench.report.runs import geometric_mean, load_any, own_provider
from bench.report.titles import TITLES
from plora_kernels.tuning.tables import device_key

HISTORY = Path(__file__).parents[1] / "results" / "history"


@dataclass(frozen=True)
class Ratio:
    """One provider's time on one shape, divided by the base's and by PEFT's (None if PEFT has no time)."""

    op: str
    layer: str
    m: int
    k: int
    n: int
    r: int
    dtype: str
    provider: str
    ratio_to_base: float
    ratio_to_peft: float | None

    @property
    def shape(self) -> tuple[object, ...]:
        return (self.op, self.layer, self.m, self.k, self.n, self.r, self.dtype)


@dataclass(frozen=True)
class HistoryEntry:
    """A run in the history. `commit` ends in "+" if files differed from it."""

    date: str
    commit: str
    device_name: str
    versions: Mapping[str, Any]
    ratios: tuple[Ratio, ...]

    @property
    def file_name(self) -> str:
        """Return <date>-<commit>-<device>.json; a commit with changes is marked."""
        commit = self.commit.rstrip("+")[:12] + ("-changed" if self.commit.endswith("+") else "")
        return f"{self.date[:10]}-{commit}-{device_key(self.device_name)}.json"

    @property
    def name(self) -> str:
        """Return the day and the short commit."""
        return f"{self.date[:10]} {self.commit.rstrip('+')[:7]}{'+' if self.commit.endswith('+') else ''}"


@dataclass(frozen=True)
class Mean:
    """The fused provider's geometric means of one op in one run: time ÷ base and ÷ PEFT."""

    run: HistoryEntry
    to_base: float
    to_peft: float

    @property
    def text(self) -> str:
        return f"{self.to_base:.3f} / {self.to_peft:.3f}"


def read_run(path: Path) -> HistoryEntry:
    """Read a file of the suites or of `python -m bench.gpu` as a run to keep."""
    run = load_any(path)
    timed = [record for providers in run.cases() for record in providers.values() if record.get("status") == "timed"]
    return HistoryEntry(run.date, run.commit, run.device_name, run.versions, tuple(map(_ratio, timed)))


def keep(path: Path, folder: Path = HISTORY) -> Path:
    """Add a results file to the history and return its path; the same commit on the same day and device is replaced."""
    run = read_run(path)
    kept = folder / run.file_name
    head = json.dumps({**asdict(run), "ratios": []}, ensure_ascii=False).removesuffix("[]}")
    lines = ",\n".join(json.dumps(asdict(ratio), ensure_ascii=False) for ratio in run.ratios)
    write_text(kept, f"{head}[\n{lines}\n]}}\n")
    return kept


def load_history(folder: Path = HISTORY) -> list[HistoryEntry]:
    """Return the kept runs in order of time; raise ResultsError for a file that is no run, and for an empty folder."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            ratios = tuple(Ratio(**ratio) for ratio in saved.pop("ratios"))
            runs.append(HistoryEntry(**saved, ratios=ratios))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"{path} is no kept run ({type(error).__name__}: {error}); remove it") from error
    if not runs:
        raise ResultsError(f"{folder} holds no runs; `make bench` keeps each, and bench.report FILE --keep one by hand")
    return sorted(runs, key=lambda run: run.date)


def means(runs: Sequence[HistoryEntry], op: str) -> list[Mean]:
    """Return the fused provider's means of one op for each run of one device that measured it.

    They are taken over the shapes that all these runs have, so that they can be compared; nan if there are none.
    """
    measured = [(run, shapes) for run in runs if (shapes := _fused(run, op))]
    common = set.intersection(*(set(shapes) for _, shapes in measured)) if measured else set()
    return [
        Mean(
            run,
            geometric_mean(shapes[shape].ratio_to_base for shape in common),
            geometric_mean(ratio for shape in common if (ratio := shapes[shape].ratio_to_peft)),
        )
        for run, shapes in measured
    ]


def history_markdown(runs: Sequence[HistoryEntry]) -> str:
    """Return a table per device: one line per run, the fused provider ÷ base and ÷ PEFT for each op."""
    parts = []
    for device, own in by_device(runs).items():
        cells = {op: {mean.run.file_name: mean.text for mean in means(own, op)} for op in OPS}
        ops = [op for op in OPS if cells[op]]
        header = ["run", "torch", *(f"{TITLES[op].short} ÷ base / ÷ PEFT" for op in ops)]
        rows = [
            [run.name, str(run.versions.get("torch")), *(cells[op].get(run.file_name, "–") for op in ops)]
            for run in own
        ]
        title = f"**{device}**, fused, geometric means over the shapes all runs share"
        parts.append(f"{title}\n\n{markdown_table(header, rows)}")
    return "\n\n".join(parts) + "\n"


def by_device(runs: Iterable[HistoryEntry]) -> dict[str, list[HistoryEntry]]:
    """Return the runs of each device, in the order given."""
    found: dict[str, list[HistoryEntry]] = {}
    for run in runs:
        found.setdefault(run.device_name, []).append(run)
    return found


def _fused(run: HistoryEntry, op: str) -> dict[tuple[object, ...], Ratio]:
    return {ratio.shape: ratio for ratio in run.ratios if ratio.op == op and ratio.provider == own_provider(op)}


def _ratio(record: Record) -> Ratio:
    found = {**record, "layer": f"{record['model']} {record['projection']}"}
    for name in ("ratio_to_base", "ratio_to_peft"):
        found[name] = None if record[name] is None else round(record[name], 4)
    return Ratio(**{field.name: found[field.name] for field in fields(Ratio)})
