"""One class of shapes after another: candidates compiled and checked in processes of their own, then timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from bench.harness.processes import Outcome, Workers, require_device
from bench.harness.records import RecordFile, blank
from bench.tune.search import Timed, best_of_each_design, design_of, narrowed, search
from bench.tune.trials import Trial, for_checking, make_trial
from plora_kernels.tuning.blocks import DESIGNS, KINDS, Blocks, Hardware, MatmulBlocks, ShapeClass
from plora_kernels.tuning.candidates import candidates
from plora_kernels.tuning.lookup import forget_tables
from plora_kernels.tuning.tables import Entry, load_table, save_table

SECONDS_EACH = 60.0
# A candidate that is being checked when its class's time is up gets this much longer.
GRACE_SECONDS = 8.0
LOGS = Path(__file__).parents[1] / "results" / "tune"


@dataclass(frozen=True)
class Attempt:
    """A candidate to compile, run and check in a process of its own."""

    shape: ShapeClass
    blocks: Blocks
    device: str


@dataclass(frozen=True)
class Search:
    """Correct candidates to time in a process of its own."""

    shape: ShapeClass
    candidates: tuple[Blocks, ...]
    device: str


@dataclass
class Tuning:
    """A run's settings and results. After `deadline` nothing is started, at `end` everything is stopped."""

    device: torch.device
    hardware: Hardware
    tables: tuple[Path, ...]
    log: RecordFile
    most: int
    started: float
    deadline: float
    end: float
    class_seconds: float
    designs: tuple[str, ...] = DESIGNS
    entries: dict[ShapeClass, Entry] = field(default_factory=dict)
    searched: dict[ShapeClass, list[Timed]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)


@functools.lru_cache(maxsize=1)
def _trial(shape: ShapeClass, device: str) -> Trial:
    return make_trial(shape, torch.device(device))


def attempt_candidate(attempt: Attempt) -> None:
    """Compile a candidate, run it on fewer rows and check it; raise an error if it fails or is wrong."""
    # Candidates of a class come one after another: the tensors and the fp64 reference are made once.
    try:
        _trial(for_checking(attempt.shape), attempt.device).check(attempt.blocks)
    except Exception as error:
        require_device(attempt.device, error)
        raise


def time_candidates(work: Search) -> list[Timed]:
    """Time candidates at full size."""
    device = torch.device(work.device)
    return search(make_trial(work.shape, device), work.candidates, device)


def tune_class(tuning: Tuning, shape: ShapeClass, workers: Workers, timer: Workers) -> bool:
    """Search one class, log every candidate and write the table; return whether there was time for it.

    Candidates that are not checked within `class_seconds` are not timed either.
    """
    default, *others = candidates(shape, tuning.hardware)
    known = (default, *(one for one in others if not isinstance(one, MatmulBlocks) or one.design in tuning.designs))
    tried = narrowed(shape, known, tuning.searched, tuning.most)
    attempts = [Attempt(shape, blocks, tuning.device.type) for blocks in tried]
    limit = min(tuning.deadline, time.monotonic() + tuning.class_seconds)
    answers: dict[int, Outcome] = {}
    for position, outcome in workers.outcomes(attempts, limit, limit + GRACE_SECONDS):
        answers[position] = outcome
        known_now = f"[{len(answers)}/{len(attempts)}] {shape.op} {attempts[position].blocks}"
        tuning.say(f"{known_now}: {outcome.error or 'right'}")
    right = [attempts[position].blocks for position in sorted(answers) if answers[position].error is None]
    dropped = {attempts[position].blocks: answer.error for position, answer in answers.items() if answer.error}
    too_late = time.monotonic() > tuning.deadline
    if not answers or (too_late and len(answers) < len(attempts)):
        return False
    found = _time(tuning, shape, right, dropped, timer)
    if found is None:
        return False
    tuning.searched[shape] = found
    tuning.log.add(_records(shape, found, dropped))
    if found:
        tuning.entries[shape] = Entry(shape, found[0].blocks, found[0].time_ms)
        for path in tuning.tables:
            save_table(path, tuning.entries.values(), tuning.log.meta)
        forget_tables()
    _show(tuning, shape, found, dropped, len(known))
    return True


def _time(
    tuning: Tuning, shape: ShapeClass, right: Sequence[Blocks], dropped: dict[Blocks, str], timer: Workers
) -> list[Timed] | None:
    """Time the correct candidates and add those that fail at full size to `dropped`; return None if the time was up."""
    if not right:
        return []
    items = [Search(shape, tuple(right), tuning.device.type)]
    for position, outcome in timer.outcomes(items, tuning.deadline, tuning.end):
        if outcome.value is not None:
            return outcome.value
        if outcome.cut:
            return None
        tried = items[position].candidates
        ran = outcome.last_note
        lost = tried if ran is None else (tried[ran],)
        for blocks in lost:
            dropped[blocks] = str(outcome.error)
            tuning.say(f"{shape.op} {blocks}: {outcome.error}")
        rest = tuple(blocks for blocks in tried if blocks not in lost)
        if not rest:
            return []
        items.append(replace(items[position], candidates=rest))
    return None


def _records(shape: ShapeClass, found: Sequence[Timed], dropped: Mapping[Blocks, str]) -> list[dict[str, object]]:
    """Return a record per candidate; K and N are the depth and width of the class's own product."""
    facts = {"op": shape.op, "m": shape.m, "k": shape.d_in, "n": shape.d_out, "r": shape.r, "dtype": shape.dtype}
    records = []
    for place, timed in enumerate(found):
        status = {"status": "best" if place == 0 else "timed", "rounds": timed.rounds, "blocks": asdict(timed.blocks)}
        records.append(blank(**facts, provider=timed.design, time_ms=timed.time_ms) | status)
    for blocks, cause in dropped.items():
        why = {"status": "wrong", "cause": cause, "blocks": asdict(blocks)}
        records.append(blank(**facts, provider=design_of(blocks)) | why)
    return records


def _show(tuning: Tuning, shape: ShapeClass, found: Sequence[Timed], dropped: Mapping[Blocks, str], known: int) -> None:
    name = f"{shape.op} {shape.dtype} m {shape.m} d_in {shape.d_in} d_out {shape.d_out} r {shape.r}"
    best = ", ".join(f"{design} {timed.time_ms:.4g} ms" for design, timed in best_of_each_design(found).items())
    tuning.say(f"{name}: {best or 'nothing runs'} ({len(found)} of {known} candidates timed, {len(dropped)} dropped)")
    if found:
        sizes = ", ".join(f"{key} {value}" for key, value in asdict(found[0].blocks).items())
        print(f"          best: {sizes}", flush=True)
    for cause in dict.fromkeys(dropped.values()):
        same = [blocks for blocks, why in dropped.items() if why == cause]
        print(f"          DROPPED {len(same)}, first {same[0]}: {cause}", flush=True)


def resume(tuning: Tuning) -> None:
    """Read the entries of the table, which stay until new ones replace them, and the figures of the log."""
    if tuning.tables[0].is_file():
        tuning.entries = {entry.shape: entry for entry in load_table(tuning.tables[0]).entries}
    for record in tuning.log.records:
        sizes = (record[name] for name in ("op", "dtype", "m", "k", "n", "r"))
        shape = ShapeClass(*sizes)
        timed = tuning.searched.setdefault(shape, [])
        if record["status"] in ("best", "timed"):
            timed.append(Timed(KINDS[shape.op](**record["blocks"]), record["time_ms"], record["rounds"]))
