"""Find the fastest block sizes for the present device and write them where `plora_kernels` looks them up.

`python -m bench.tune` goes through the shape classes, the most important first. Candidates are compiled and checked
against fp64 in processes of their own (one that hangs, crashes or is wrong is reported and dropped), then timed with
the cache flushed, all of them briefly and the best longer. Each candidate's result is printed as it comes. After each
class the table is written: the user's ($PLORA_KERNELS_CACHE or the user's cache folder), or with `--package` the one
that comes with the package. The log beside it holds every measurement; the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench.harness.machine import (
    RESERVE_SECONDS,
    default_workers,
    describe,
    device_slug,
    measure_kernels,
    settle_compilers,
)
from bench.harness.options import add_device_options, at_least, exit_status, sizes
from bench.harness.processes import STARTUP_SECONDS, Workers
from bench.harness.records import open_records
from bench.tune.classes import belongs, shape_classes
from bench.tune.tuner import LOGS, SECONDS_EACH, Tuning, attempt_candidate, resume, time_candidates, tune_class
from plora_kernels.backend import backend
from plora_kernels.tuning.blocks import DESIGNS, OPS, ShapeClass
from plora_kernels.tuning.lookup import hardware_of
from plora_kernels.tuning.tables import PACKAGED, user_folder


def tune(options: argparse.Namespace) -> int:
    """Tune the classes for which there is time; return 0, or 1 if a class has no correct candidate."""
    device = torch.device(options.device)
    tables, log = paths(options, device)
    meta = describe(device, options.commit)
    tuning = Tuning(
        device=device,
        hardware=hardware_of(device),
        tables=tables,
        log=open_records(log, meta, fresh=options.fresh),
        most=options.candidates,
        designs=tuple(options.designs),
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
    timing = Workers(time_candidates, min(count, 1), SECONDS_EACH)
    with Workers(attempt_candidate, count, SECONDS_EACH) as workers, timing as timer:
        if left:  # starting Python must not count in a class's seconds
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
    """Return the classes to tune that the options choose, the most important first."""
    chosen = [
        shape
        for shape in shape_classes(options.device)
        if shape.op in options.ops
        and (options.ranks is None or shape.r in options.ranks)
        and (options.shapes is None or any(belongs(shape, k, n) for k, n in options.shapes))
    ]
    return chosen[: options.classes]


def paths(options: argparse.Namespace, device: torch.device) -> tuple[tuple[Path, ...], Path]:
    """Return where the table goes, the path that is looked up first, and the path of the log."""
    file = f"{device_slug(device)}.json"
    own = PACKAGED if options.package else user_folder()
    if options.out is not None:
        # In a sitting the user's tables are those of DIR: the two paths are then the same.
        tables = dict.fromkeys(path.absolute() for path in (own / file, options.out / "tables" / file))
        return tuple(tables), options.log or options.out / "tune" / file
    logs = LOGS if options.package else user_folder() / "tune"
    return (own / file,), options.log or logs / file


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    fresh = "measure everything anew; an entry of the table stays until then"
    add_device_options(parser, seconds=240.0, fresh=fresh)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    layer = partial(sizes, "K and N", "4096x4096")
    parser.add_argument(
        "--shapes", nargs="+", type=layer, metavar="KxN", help="only classes of layers from K to N features"
    )
    parser.add_argument("--ranks", nargs="+", type=int, metavar="R", help="only classes of these ranks")
    parser.add_argument("--classes", type=partial(at_least, 1), metavar="N", help="only the first N of these classes")
    parser.add_argument(
        "--class-seconds",
        type=float,
        default=float("inf"),
        help="time what is checked of a class's candidates by then (default: all)",
    )
    parser.add_argument("--package", action="store_true", help="write the package's table instead of the user's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="leave a copy of the table and the log here too")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where every measurement goes")
    parser.add_argument(
        "--designs",
        nargs="+",
        default=list(DESIGNS),
        choices=DESIGNS,
        help="of matmuls, try only these and the default",
    )
    parser.add_argument("--candidates", type=int, default=96, help="how many to try where nothing like it was searched")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 1 if no correct candidate was found, 2 for invalid input."""
    settle_compilers()  # so that kernels that were compiled ahead are found
    options = parse(arguments)
    if options.device == "cuda" and torch.cuda.is_available():
        measure_kernels()
    if backend(options.device) != "triton":
        print(f"error: the kernels do not run on {options.device} here, so there is nothing to tune", file=sys.stderr)
        return 2
    return exit_status(tune, options)
