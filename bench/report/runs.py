"""Reading saved results: files of the suites and of `python -m bench.gpu`, as the same kind of records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import MIXED_OPS, OPS
from bench.harness.records import (
    MODEL,
    SIMULATION,
    Record,
    ResultsError,
    case_key,
    holds_records,
    load_records,
    read_json,
)

# The fields that the suites save for a layer, for its figures if it was timed, for a training step of many clients and
# for one of a whole model.
LAYER = ("model", "projection", "m", "k", "n", "r", "dtype", "provider")
FIGURES = ("time_ms", "iqr_ms", "rounds", "ratio_to_base", "ratio_to_peft", "peak_bytes")
STEP = ("model", "cohort", "batch", "length", "dtype", "provider", "status")
WHOLE = ("model", "batch", "length", "dtype", "provider", "status")
# Ways that an op's own provider is compared with besides PEFT's, and the titles of these columns.
OTHER_WAYS = {"fused-apart": "fused ÷ apart", "fused-inplace": "fused ÷ in place"}
MIXED_WAYS = {"peft-autocast": "mixed ÷ autocast", "fused": "mixed ÷ fused"}
Providers = Mapping[str, Record]


@dataclass(frozen=True)
class Run:
    """A run: a record per case and provider, with device, versions and commit.

    `commit` ends in "+" if files differed from it. Only the suites save `threads` and `backend`.
    """

    records: tuple[Record, ...]
    device_name: str
    versions: Mapping[str, Any]
    commit: str
    date: str
    threads: int | None = None
    backend: str | None = None

    @property
    def ops(self) -> tuple[str, ...]:
        """Return the layers' measured ops in the order of tables."""
        return tuple(op for op in OPS if self.cases(op))

    @property
    def steps(self) -> tuple[Record, ...]:
        """Return the records of training steps."""
        return tuple(record for record in self.records if record["op"] == SIMULATION)

    @property
    def models(self) -> tuple[Record, ...]:
        """Return the records of whole models' training steps."""
        return tuple(record for record in self.records if record["op"] == MODEL)

    def cases(self, op: str | None = None) -> list[Providers]:
        """Return the layers' records by case and provider, of one op or of all, in the order measured."""
        return [providers for providers in by_case(self.records) if op in (None, facts_of(providers)["op"])]


def load_run(path: Path) -> Run:
    """Read a file of `pytest --benchmark --benchmark-json=PATH`.

    Raises ResultsError naming the file and what is missing: the file, valid JSON, the list of benchmarks, or a field.
    """
    saved = read_json(path, suites_command(path))
    if not isinstance(saved, dict) or not saved.get("benchmarks"):
        raise ResultsError(f"{path} holds no benchmarks; `{suites_command(path)}` writes some")
    try:
        timed = _checked([item["extra_info"] for item in saved["benchmarks"]], "timed", FIGURES)
        absent = _checked(saved["not_available"], "not available", ("cause",))
        machine, commit = saved["machine_info"], saved["commit_info"]
        return Run(
            (*timed, *absent),
            machine["device_name"],
            machine["versions"],
            str(commit["id"]) + ("+" if commit.get("dirty") else ""),
            saved["datetime"],
            machine["threads"],
            machine["backend"],
        )
    except KeyError as error:
        raise ResultsError(f"{path} has no {error.args[0]!r}; `pytest --benchmark` of this version saves it") from error
    except (TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is not what the suites save ({type(error).__name__}: {error})") from error


def suites_command(path: Path) -> str:
    return f"pytest --benchmark --benchmark-json={path}"


def _checked(records: Iterable[Record], status: str, of_layer: Sequence[str]) -> Iterator[Record]:
    """Yield records, each with a status; raise KeyError for a field that one of a layer or a training step lacks."""
    of_op = dict.fromkeys(OPS, (*LAYER, *of_layer)) | {SIMULATION: STEP, MODEL: WHOLE}
    for record in records:
        needed = of_op.get(record["op"], ())
        missing = [name for name in needed if name not in record]
        if missing:
            raise KeyError(missing[0])
        yield {"status": status, **record}


def run_of_device(meta: Mapping[str, Any], records: Sequence[Record]) -> Run:
    """Return a device's records as a run."""
    commit = meta.get("commit") or "unknown"
    return Run(tuple(records), meta["device_name"], meta["versions"], commit, meta["date"])


def load_any(path: Path) -> Run:
    """Read a file of the suites or of `python -m bench.gpu`."""
    return run_of_device(*load_records(path)) if holds_records(path) else load_run(path)


def by_case(records: Iterable[Record]) -> list[Providers]:
    """Return the layers' records by case and provider, in the order measured."""
    cases: dict[tuple[object, ...], dict[str, Record]] = {}
    for record in records:
        if record["op"] in OPS:
            key = (case_key(record), record.get("model"), record.get("projection"))
            cases.setdefault(key, {})[record["provider"]] = record
    return list(cases.values())


def facts_of(providers: Providers) -> Record:
    """Return one record of a case, for the fields that all of them share."""
    return next(iter(providers.values()))


def own_provider(op: str) -> str:
    """Return the provider that an op is about: this library, in mixed precision with factors in fp32."""
    return "fused-mixed" if op in MIXED_OPS else "fused"


def other_ways(op: str, names: Iterable[str]) -> dict[str, str]:
    """Return those among `names` that an op's own provider is compared with besides PEFT, with the columns' titles."""
    ways = MIXED_WAYS if op in MIXED_OPS else OTHER_WAYS
    present = set(names)
    return {name: title for name, title in ways.items() if name in present}


def timed(providers: Providers, name: str) -> Record | None:
    """Return a provider's record; None if there is none, or it has no figures."""
    record = providers.get(name)
    return record if record and record.get("status") == "timed" else None


def ratio_of(providers: Providers, name: str, other: str) -> float | None:
    """Return one provider's time ÷ another's, None if one of them was not timed."""
    # Each divided by the base of its own loop, because they may have been timed in different loops.
    one, two = (record["ratio_to_base"] if (record := timed(providers, each)) else None for each in (name, other))
    return one / two if one and two else None


def geometric_mean(values: Iterable[float]) -> float:
    """Return (Π v)^(1/n) of positive values; nan for none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def size_of(record: Record) -> str:
    """Return K×N, several projections' N as the sum of their widths: 4096×(4096+1024+1024)."""
    widths = record.get("widths")
    return f"{record['k']}×{'(' + '+'.join(map(str, widths)) + ')' if widths else record['n']}"


def ratio_text(ratio: float | None) -> str:
    return f"{ratio:.2f}" if ratio else "–"
