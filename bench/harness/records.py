"""The file of `python -m bench.gpu`: a JSON list of records, written after every case, so that a run can be resumed.

The first record has op "meta": the device, versions, the code, ceilings. Every other one has at least the KEYS. If a
provider was not timed its figures are null, and `status` is "wrong" or "not available" instead of "timed"; checks,
which have no figures, are "passed" or "wrong". Several projections of one input have `widths`, whose sum is n. This
library's providers have `blocks`, by op: the designs and sizes its kernels took. Training steps, op "simulation", have
no matrix and no time_ms, but the seconds that a step of all clients of a cohort takes; so have those of whole models,
op "model".

A case's providers may have been timed in several runs, or in several loops of one run. Each provider has one record a
case; a provider that has none yet is timed in a new loop, together with *base* and *peft*, whose records stay as they
are. So both numbers of a ratio are from one loop: `ratio_to_base` is time_ms ÷ `base_ms`, the base's median in the
record's own loop, and `ratio_to_peft` is against PEFT in that loop. Within a case ratios can be compared, times of
different loops cannot.

A record's `tables` is a digest of the tables of block sizes it ran with: a run may go on with other tables, but not
with other code. Under `--defaults` it is null, and the records have a file of their own. A record with a `commit` was
measured at that one, and moved into the file from an earlier one.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fed.files import write_atomically

# The op of training steps, which have keys of their own.
SIMULATION = "simulation"
# The op of a whole model's training step, likewise.
MODEL = "model"
KEYS = ("op", "m", "k", "n", "r", "dtype", "provider", "time_ms", "ratio_to_base")
# Fields of the meta record that must be equal for new records to be added to a file.
SAME = ("device", "device_name", "versions", "source")
Record = Mapping[str, Any]


def case_key(record: Record) -> tuple[object, ...]:
    """Return what identifies a case; all providers of a case share it."""
    if record["op"] == SIMULATION:
        sizes = tuple(record[name] for name in ("op", "model", "cohort", "batch", "length", "dtype"))
        return *sizes, record.get("unequal", False)
    if record["op"] == MODEL:
        return tuple(record[name] for name in ("op", "model", "batch", "length", "dtype"))
    return tuple(record.get(name) for name in ("op", "m", "k", "n", "r", "dtype", "form"))


def blank(**known: object) -> dict[str, object]:
    """Return a record with all required keys, null unless given."""
    return dict.fromkeys(KEYS) | known


@dataclass
class RecordFile:
    """Records and the file that holds them; every record that is added gets the items of `stamp`."""

    path: Path
    meta: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    stamp: dict[str, Any] = field(default_factory=dict)

    def add(self, records: Iterable[Record]) -> None:
        """Append records and write the file; if it cannot be written they are not kept in memory either."""
        before = len(self.records)
        self.records.extend({**record, **self.stamp} for record in records)
        try:
            self.save()
        except OSError:
            del self.records[before:]
            raise

    def save(self) -> None:
        """Write the file: one record a line."""
        lines = ",\n".join(
            json.dumps(record, ensure_ascii=False) for record in (blank(op="meta") | self.meta, *self.records)
        )
        write_text(self.path, f"[\n{lines}\n]\n")

    def done(self) -> set[tuple[object, ...]]:
        """Return the keys of the cases that have records."""
        return {case_key(record) for record in self.records}

    def of_case(self, facts: Record) -> dict[str, Record]:
        """Return a case's records by provider."""
        key = case_key(facts)
        return {record["provider"]: record for record in self.records if case_key(record) == key}


def open_records(
    path: Path, meta: Mapping[str, Any], *, fresh: bool, stamp: Mapping[str, Any] | None = None
) -> RecordFile:
    """Return the file's records to continue with; none if there is no file or `fresh` is set.

    Records added later get the items of `stamp`; those in the file do not change.

    Raises ResultsError if the file was made by another device, other versions or other code.
    """
    if fresh or not path.exists():
        return RecordFile(path, dict(meta), stamp=dict(stamp or {}))
    old, records = load_records(path)
    for name in SAME:
        if old.get(name) != meta.get(name):
            was, now = old.get(name), meta.get(name)
            raise ResultsError(f"{path} was made with {name} {was!r}, now it is {now!r}; --fresh starts over")
    return RecordFile(path, old, list(records), dict(stamp or {}))


def holds_records(path: Path) -> bool:
    """Say whether a file holds a list, as `python -m bench.gpu` writes it, and not what the suites save."""
    return path.is_file() and path.read_text(encoding="utf-8").lstrip().startswith("[")


def load_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return a file's meta record and the others.

    Raises ResultsError naming the file and what is wrong: it is missing, not JSON, not a list, or lacks a key.
    """
    saved = read_json(path, f"python -m bench.gpu --out {path.parent}")
    if not isinstance(saved, list) or not saved or not all(isinstance(record, dict) for record in saved):
        raise ResultsError(f"{path} is no list of records; `python -m bench.gpu` writes one")
    for position, record in enumerate(saved):
        missing = [name for name in KEYS if name not in record]
        if missing:
            raise ResultsError(f"record {position} of {path} has no {missing[0]!r}")
    if saved[0]["op"] != "meta":
        raise ResultsError(f"record 0 of {path} has op {saved[0]['op']!r}; the first must be 'meta'")
    return saved[0], saved[1:]


class ResultsError(ValueError):
    """A results file that is missing or does not hold what a benchmark run saves."""


def read_json(path: Path, command: str) -> Any:
    """Return what a file holds; raises ResultsError if it is not JSON or missing, with the command that writes it."""
    if not path.is_file():
        raise ResultsError(f"{path} does not exist; `{command}` writes it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
