"""Saved benchmark results: read from pytest-benchmark's JSON, checked once, typed from then on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.cases import OPS
from bench.harness.records import ResultsError, read_json

# The suites' providers, in the order of a table's columns.
PROVIDERS = ("base", "peft", "peft-compiled", "fused-apart", "fused-inplace", "fused")
# This library's other ways to do the same, and the column that compares *fused* with each.
OTHER_WAYS = {"fused-apart": "fused ÷ apart", "fused-inplace": "fused ÷ in place"}


@dataclass(frozen=True)
class Shape:
    """What was measured: one pass over one projection, or several of `widths` whose sum is n. `m` is 0 for folds."""

    op: str
    model: str
    projection: str
    m: int
    k: int
    n: int
    r: int
    dtype: str
    widths: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """Return the shape in words: model, projection, K×N with every width of several, and the rank."""
        return f"{self.model} {self.projection} {self.k}×{width_text(self.n, self.widths)}, R {self.r}"


@dataclass(frozen=True)
class Entry:
    """One provider's figures: median and interquartile range in ms, ratios of medians, peak bytes of a call."""

    time_ms: float
    iqr_ms: float
    rounds: int
    ratio_to_base: float
    ratio_to_peft: float
    peak_bytes: int


@dataclass(frozen=True)
class BenchmarkRun:
    """A run: `entries` and `not_available` (the cause) by shape and provider, `machine` as saved.

    `commit` ends in "+" where files differed from it.
    """

    entries: Mapping[Shape, Mapping[str, Entry]]
    not_available: Mapping[Shape, Mapping[str, str]]
    machine: Mapping[str, Any]
    commit: str
    date: str

    @property
    def ops(self) -> tuple[str, ...]:
        """Return the measured ops in the order of tables."""
        return tuple(op for op in OPS if self.shapes(op))

    def shapes(self, op: str | None = None) -> list[Shape]:
        """Return the measured shapes, of one op or of all, in the order they were measured."""
        every = dict.fromkeys([*self.entries, *self.not_available])
        return [shape for shape in every if op is None or shape.op == op]


def load_run(path: Path) -> BenchmarkRun:
    """Read what `pytest --benchmark --benchmark-json=PATH` saved.

    Raises ResultsError naming the file and what is missing: the file, JSON, the benchmark list, or a field.
    """
    command = f"pytest --benchmark --benchmark-json={path}"
    saved = read_json(path, command)
    if not isinstance(saved, dict) or not saved.get("benchmarks"):
        raise ResultsError(f"{path} holds no benchmarks; `{command}` writes some")
    entries: dict[Shape, dict[str, Entry]] = {}
    not_available: dict[Shape, dict[str, str]] = {}
    try:
        for facts in _of_layers([item["extra_info"] for item in saved["benchmarks"]]):
            entries.setdefault(_shape(facts), {})[facts["provider"]] = _entry(facts)
        for facts in _of_layers(saved["not_available"]):
            not_available.setdefault(_shape(facts), {})[facts["provider"]] = facts["cause"]
        commit = commit_name(saved["commit_info"])
        return BenchmarkRun(entries, not_available, saved["machine_info"], commit, saved["datetime"])
    except KeyError as error:
        raise ResultsError(f"{path} has no {error.args[0]!r}; `pytest --benchmark` of this version saves it") from error


def commit_name(saved: Mapping[str, Any]) -> str:
    """Return the commit that pytest-benchmark saved, "+" behind it where files differed from it."""
    return str(saved["id"]) + ("+" if saved.get("dirty") else "")


def geometric_mean(values: Iterable[float]) -> float:
    """Return (Π v)^(1/n) of positive values; nan for none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def width_text(n: int, widths: Sequence[int] = ()) -> str:
    """Return N, or the widths of several projections as a sum: (4096+1024+1024)."""
    return f"({'+'.join(map(str, widths))})" if widths else str(n)


def _of_layers(items: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out what the other suites save beside the layers' figures."""
    return [facts for facts in items if facts["op"] in OPS]


def _shape(facts: Mapping[str, Any]) -> Shape:
    named = {field.name: facts[field.name] for field in fields(Shape) if field.name != "widths"}
    return Shape(**named, widths=tuple(facts.get("widths", ())))


def _entry(facts: Mapping[str, Any]) -> Entry:
    return Entry(**{field.name: facts[field.name] for field in fields(Entry)})
