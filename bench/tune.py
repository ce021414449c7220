"""Find the fastest block sizes for the device at hand and write them where `plora_kernels` looks them up.

`python -m bench.tune` goes through the shape classes, the most important first. Candidates are compiled and checked
against fp64 in processes of their own (one that hangs, crashes or errs is reported and dropped), then timed with the
cache flushed, all of them briefly and the best longer. Each is said as it is known. After each class the table is
written: the user's
($PLORA_KERNELS_CACHE or the user's cache folder), or with `--package` the one that comes with the package. The log
beside it holds every measurement; the same command goes on where it was cut.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from bench.device_health import require_device
from bench.environment import device_slug, settle_compilers
from bench.gpu import RESERVE_SECONDS, at_least, default_workers, describe, measure_kernels
from bench.records import RecordFile, blank, open_records
from bench.results import ResultsError
from bench.search import Timed, best_of_each_design, design_of, narrowed, search
from bench.trials import Trial, for_checking, make_trial
from bench.tuned_classes import belongs, layer_size, shape_classes
from bench.workers import STARTUP_SECONDS, Outcome, Workers, end_on_termination, leave
from plora_kernels.backend import backend
from plora_kernels.blocks import KINDS, OPS, Blocks, Hardware, ShapeClass
from plora_kernels.candidates import candidates
from plora_kernels.configs import forget_tables, hardware_of
from plora_kernels.errors import ConfigError
from plora_kernels.tables import PACKAGED, Entry, load_table, save_table, user_folder

SECONDS_EACH = 60.0
# A candidate that is being checked when its class's time is up gets this much longer.
GRACE_SECONDS = 8.0
LOGS = Path(__file__).parent / "results" / "tune"


@dataclass(frozen=True)
class Attempt:
    """A candidate to compile, run and check in a process of its own."""

    shape: ShapeClass
    blocks: Blocks
    device: str


@dataclass(frozen=True)
class Search:
    """Candidates that are right, to time in a process of its own."""

    shape: ShapeClass
    candidates: tuple[Blocks, ...]
    device: str


@dataclass
class Tuning:
    """A run's settings and what it has found. After `deadline` nothing is begun, at `end` everything is stopped."""

    device: torch.device
    hardware: Hardware
    tables: tuple[Path, ...]
    log: RecordFile
    most: int
    started: float
    deadline: float
    end: float
    class_seconds: float
    entries: dict[ShapeClass, Entry] = field(default_factory=dict)
    searched: dict[ShapeClass, list[Timed]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)


@functools.lru_cache(maxsize=1)
def _trial(shape: ShapeClass, device: str) -> Trial:
    return make_trial(shape, torch.device(device))


def attempt_candidate(attempt: Attempt) -> None:
    """Compile a candidate, run it on fewer rows and check it; raises whatever is wrong with it."""
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
    """Search one class, log every candidate and write the table; return whether there was time to.

    Candidates that are not checked within `class_seconds` are not timed either.
    """
    known = candidates(shape, tuning.hardware)
    tried = narrowed(shape, known, tuning.searched, tuning.most)
    attempts = [Attempt(shape, blocks, tuning.device.type) for blocks in tried]
    limit = min(tuning.deadline, time.monotonic() + tuning.class_seconds)
    answers: dict[int, Outcome] = {}
    for position, outcome in workers.outcomes(attempts, limit, limit + GRACE_SECONDS):
        answers[position] = outcome
        known_now = f"[{len(answers)}/{len(attempts)}] {shape.op} {attempts[position].blocks}"
        tuning.say(f"{known_now}: {outcome.error or 'right'}")
    right = [attempts[position].blocks for position in sorted(answers) if answers[position].error is None]
    dropped = [(attempts[position].blocks, answer) for position, answer in answers.items() if answer.error is not None]
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
    tuning: Tuning, shape: ShapeClass, right: Sequence[Blocks], dropped: list[tuple[Blocks, Outcome]], timer: Workers
) -> list[Timed] | None:
    """Time the candidates that are right; add those that fail at full size to `dropped`. None if the time was up."""
    if not right:
        return []
    items = [Search(shape, tuple(right), tuning.device.type)]
    for position, outcome in timer.outcomes(items, tuning.deadline, tuning.end):
        if outcome.value is not None:
            return outcome.value
        if outcome.cut:
            return None
        tried = items[position].candidates
        ran = outcome.notes[-1] if outcome.notes else None
        lost = tried if ran is None else (tried[ran],)
        dropped += [(blocks, outcome) for blocks in lost]
        for blocks in lost:
            tuning.say(f"{shape.op} {blocks}: {outcome.error}")
        rest = tuple(blocks for blocks in tried if blocks not in lost)
        if not rest:
            return []
        items.append(replace(items[position], candidates=rest))
    return None


def _records(
    shape: ShapeClass, found: Sequence[Timed], dropped: Sequence[tuple[Blocks, Outcome]]
) -> list[dict[str, object]]:
    """Return a record per candidate; K and N are the depth and width of the class's own product."""
    facts = {"op": shape.op, "m": shape.m, "k": shape.d_in, "n": shape.d_out, "r": shape.r, "dtype": shape.dtype}
    records = []
    for place, timed in enumerate(found):
        status = {"status": "best" if place == 0 else "timed", "rounds": timed.rounds, "blocks": asdict(timed.blocks)}
        records.append(blank(**facts, provider=timed.design, time_ms=timed.time_ms) | status)
    for blocks, outcome in dropped:
        why = {"status": "wrong", "cause": outcome.error, "blocks": asdict(blocks)}
        records.append(blank(**facts, provider=design_of(blocks)) | why)
    return records


def _show(
    tuning: Tuning, shape: ShapeClass, found: Sequence[Timed], dropped: Sequence[tuple[Blocks, Outcome]], known: int
) -> None:
    name = f"{shape.op} {shape.dtype} m {shape.m} d_in {shape.d_in} d_out {shape.d_out} r {shape.r}"
    best = ", ".join(f"{design} {timed.time_ms:.4g} ms" for design, timed in best_of_each_design(found).items())
    tuning.say(f"{name}: {best or 'nothing runs'} ({len(found)} of {known} candidates timed, {len(dropped)} dropped)")
    if found:
        sizes = ", ".join(f"{key} {value}" for key, value in asdict(found[0].blocks).items())
        print(f"          best: {sizes}", flush=True)
    for cause in dict.fromkeys(outcome.error for _, outcome in dropped):
        same = [blocks for blocks, outcome in dropped if outcome.error == cause]
        print(f"          DROPPED {len(same)}, first {same[0]}: {cause}", flush=True)


def resume(tuning: Tuning) -> None:
    """Take up the entries of the table, each of which stays until a new one takes its place, and the log's figures."""
    if tuning.tables[0].is_file():
        tuning.entries = {entry.shape: entry for entry in load_table(tuning.tables[0]).entries}
    for record in tuning.log.records:
        sizes = (record[name] for name in ("op", "dtype", "m", "k", "n", "r"))
        shape = ShapeClass(*sizes)
        timed = tuning.searched.setdefault(shape, [])
        if record["status"] in ("best", "timed"):
            timed.append(Timed(KINDS[shape.op](**record["blocks"]), record["time_ms"], record["rounds"]))


def tune(options: argparse.Namespace) -> int:
    """Tune what there is time for; return 0, or 1 if a class has no candidate that is right."""
    device = torch.device(options.device)
    tables, log = paths(options, device)
    meta = describe(device, options.commit)
    tuning = Tuning(
        device=device,
        hardware=hardware_of(device),
        tables=tables,
        log=open_records(log, meta, fresh=options.fresh),
        most=options.candidates,
        started=options.started,
        deadline=options.started + options.budget_seconds - RESERVE_SECONDS,
        end=options.started + options.budget_seconds,
        class_seconds=options.class_seconds,
    )
    resume(tuning)
    classes = choose_classes(options)
    todo = [shape for shape in classes if shape not in tuning.searched]
    tuning.say(f"{meta['device_name']}: {len(todo)} of {len(classes)} classes to tune; table {tables[0]}, log {log}")
    left = list(todo)
    count = default_workers(device) if options.workers is None else options.workers
    workers, timer = (
        Workers(attempt_candidate, count, SECONDS_EACH),
        Workers(time_candidates, min(count, 1), SECONDS_EACH),
    )
    with workers, timer:
        if left:  # a class's seconds are not those of starting Python
            timer.start()
            workers.await_ready(min(STARTUP_SECONDS, tuning.deadline - time.monotonic()))
        while left and time.monotonic() < tuning.deadline and tune_class(tuning, left[0], workers, timer):
            left.pop(0)
    tuning.say(f"{len(tuning.entries)} entries in {tables[0]}; {len(left)} classes left")
    if left:
        print("the same command goes on from here")
    without = [shape for shape in todo if shape not in left and not tuning.searched[shape]]
    return 1 if without else 0


def choose_classes(options: argparse.Namespace) -> list[ShapeClass]:
    """Return what is asked for of what can be tuned, the most important first."""
    chosen = [
        shape
        for shape in shape_classes(options.device)
        if shape.op in options.ops
        and (options.ranks is None or shape.r in options.ranks)
        and (options.shapes is None or any(belongs(shape, k, n) for k, n in options.shapes))
    ]
    return chosen[: options.classes]


def paths(options: argparse.Namespace, device: torch.device) -> tuple[tuple[Path, ...], Path]:
    """Return where the table goes, the one that is looked up first, and the log."""
    file = f"{device_slug(device)}.json"
    own = PACKAGED if options.package else user_folder()
    if options.out is not None:
        # The user's tables may be those of DIR.
        tables = dict.fromkeys(path.absolute() for path in (own / file, options.out / "tables" / file))
        return tuple(tables), options.log or options.out / "tune" / file
    logs = LOGS if options.package else user_folder() / "tune"
    return (own / file,), options.log or logs / file


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--device", default=default, choices=["cuda", "cpu"])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument(
        "--shapes", nargs="+", type=layer_size, metavar="KxN", help="only classes of layers from K to N features"
    )
    parser.add_argument("--ranks", nargs="+", type=int, metavar="R", help="only classes of these ranks")
    parser.add_argument("--classes", type=partial(at_least, 1), metavar="N", help="only the first N of these classes")
    parser.add_argument(
        "--class-seconds",
        type=float,
        default=float("inf"),
        help="time what is checked of a class's candidates by then (default: all)",
    )
    parser.add_argument("--budget-seconds", type=float, default=240.0, help="end by then; another call goes on")
    parser.add_argument("--package", action="store_true", help="write the package's table instead of the user's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="leave a copy of the table and the log here too")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where every measurement goes")
    parser.add_argument(
        "--fresh", action="store_true", help="measure everything anew; an entry of the table stays until then"
    )
    parser.add_argument("--candidates", type=int, default=96, help="how many to try where nothing like it was searched")
    parser.add_argument("--workers", type=int, help="processes that compile and check (0: none)")
    parser.add_argument("--commit", help="what to call the code where git does not know")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 1 if nothing right was found, 2 for input that cannot be used."""
    started = time.monotonic()
    settle_compilers()  # as what compiled ahead did
    options = parse(arguments)
    options.started = started
    if options.device == "cuda" and torch.cuda.is_available():
        measure_kernels()
    if backend(options.device) != "triton":
        print(f"error: the kernels do not run on {options.device} here, so there is nothing to tune", file=sys.stderr)
        return 2
    try:
        return tune(options)
    except (ResultsError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end_on_termination()
    leave(main())
