"""Check and time everything on the present device, and write one file of records.

`python -m bench.gpu --out DIR` writes DIR/<device>.json. First it checks the operators against fp64 in bfloat16 at the
shapes that are timed first, then it times every provider of every case, the most important first, then training steps
of many clients, last those of whole models, and with the time left it checks all other dtypes and shapes. The file is
written after each, so an interrupted run continues where it stopped. Times are the device's: flushing the cache keeps
the device busy while the host launches, and the host's time per call is recorded as host_us. A training step is timed
with its launches, from an idle device to an idle device.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.cases import OPS
from bench.checks.inputs import DTYPES, CheckShape
from bench.checks.operators import GATE_SHAPES, SHAPES, check_shapes
from bench.device.run import do
from bench.device.state import Run, Work, left
from bench.gpu_cases import device_cases
from bench.harness.machine import (
    RESERVE_SECONDS,
    ceilings,
    default_workers,
    describe,
    device_slug,
    settle_compilers,
    tables_digest,
)
from bench.harness.options import add_device_options, at_least, sizes, status_on_device
from bench.harness.processes import end_on_termination, leave
from bench.harness.records import MODEL, SIMULATION, case_key, open_records
from bench.harness.timing import Plan
from bench.models.cases import device_models
from bench.providers.registry import PROVIDERS
from bench.report.device_tables import summary
from bench.simulation.measure import device_simulations

PLAN = Plan(seconds_per_provider=0.25, min_rounds=12, max_rounds=24, warmup_rounds=3)
# Values of `--check-shapes` other than sizes: the shapes that are timed first, and all.
GATE, ALL = "gate", "all"


def choose_checks(options: argparse.Namespace) -> tuple[list[CheckShape], list[CheckShape]]:
    """Return the checks before anything is timed, and those in the remaining time.

    The first ones are those of the shapes that are timed first, in bfloat16. Shapes given by options are all checked
    first.
    """
    if options.no_checks:
        return [], []
    known = [shape for shape in check_shapes(options.device) if shape.dtype in options.check_dtypes]
    gate = GATE_SHAPES[options.device]
    if options.check_shapes is None:
        first = [s for s in known if s.dtype == "bfloat16" and (s.m, s.k, s.n, s.r) in gate]
        return first, [shape for shape in known if shape not in first]
    named = {GATE: gate, ALL: SHAPES[options.device]}
    chosen = dict.fromkeys(size for name in options.check_shapes for size in named.get(name, (name,)))
    dtypes = dict.fromkeys(shape.dtype for shape in known)
    return [CheckShape(options.device, dtype, *size) for dtype in dtypes for size in chosen], []


def choose_work(options: argparse.Namespace) -> Work:
    """Return all there is to do."""
    cases = {case_key(case.facts()): case for case in device_cases(options.device) if case.op in options.ops}
    simulations = device_simulations(options.device) if SIMULATION in options.ops else ()
    first, last = choose_checks(options)
    models = device_models(options.device) if MODEL in options.ops else ()
    return Work(first, list(cases.values())[: options.cases], simulations, last, models)


def choose_plan(most_rounds: int | None) -> Plan:
    """Return for how long and in how many rounds at most to time."""
    if most_rounds is None:
        return PLAN
    return replace(PLAN, min_rounds=min(PLAN.min_rounds, most_rounds), max_rounds=most_rounds)


def measure_device(options: argparse.Namespace) -> int:
    """Check, time and write; return 0, or 1 if a result was wrong."""
    device = torch.device(options.device)
    # Records of default blocks are kept apart from those of tuned ones.
    path = options.out / f"{device_slug(device)}{'-defaults' if options.defaults else ''}.json"
    tables = None if options.defaults else tables_digest()
    file = open_records(path, describe(device, options.commit), fresh=options.fresh, stamp={"tables": tables})
    run = Run(
        device=device.type,
        file=file,
        providers=tuple(options.providers),
        workers=default_workers(device) if options.workers is None else options.workers,
        plan=choose_plan(options.rounds),
        defaults=options.defaults,
        started=options.started,
        end=options.started + options.budget_seconds - RESERVE_SECONDS,
    )
    blocks = "default blocks" if options.defaults else f"tables {tables}"
    run.say(f"{file.meta['device_name']}, {blocks}; {len(file.records)} records in {path}")
    if "ceilings" not in file.meta:
        file.meta["ceilings"] = ceilings(device)
        file.save()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # other processes need the memory
    run.say(", ".join(f"{name} {value:.4g}" for name, value in file.meta["ceilings"].items()))
    work = choose_work(options)
    try:
        do(run, work)
    except OSError:  # a full disk
        _conclude(run, work)
        raise
    print(summary(file.meta, file.records))
    return _conclude(run, work)


def _conclude(run: Run, work: Work) -> int:
    """Print what is missing and, last, what was wrong; return the exit status."""
    missing = left(run, work)
    wrong = [record for record in run.file.records if record.get("status") == "wrong"]
    run.say(f"{run.file.path}: {len(run.file.records)} records, {len(wrong)} wrong, {len(missing)} left")
    if missing:
        print("left: " + "; ".join(missing))
        print("the same command goes on from here")
    for record in wrong:
        is_step = record["op"] in (SIMULATION, MODEL)
        names = ("model", "batch", "length", "dtype") if is_step else ("m", "k", "n", "r", "dtype")
        sizes = " ".join(f"{name} {record[name]}" for name in names)
        what = record.get("form") or record["provider"]
        print(f"WRONG {record['op']} {sizes}, {what}: {record['cause']}")
    return 1 if wrong else 0


def check_size(text: str) -> str | tuple[int, ...]:
    """Return a name of shapes to check, or M, K, N and R of "256x512x384x16"; raises what argparse reports."""
    return text if text in (GATE, ALL) else sizes(f"{GATE!r}, {ALL!r} or M, K, N and R", "1x64x48x4", text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where <device>.json goes")
    add_device_options(parser, seconds=480.0, fresh="start over instead of going on")
    every = [*OPS, SIMULATION, MODEL]
    parser.add_argument("--ops", nargs="+", default=every, choices=every, help="model: whole models' training steps")
    parser.add_argument("--cases", type=partial(at_least, 0), metavar="N", help="time only the first N cases")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--rounds", type=partial(at_least, 2), metavar="N", help="time no more than N rounds a case")
    parser.add_argument(
        "--defaults",
        action="store_true",
        help="take the default blocks, whatever tables there are, and write <device>-defaults.json",
    )
    parser.add_argument("--no-checks", action="store_true", help="only check what is timed")
    parser.add_argument("--check-dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument(
        "--check-shapes",
        nargs="+",
        type=check_size,
        metavar="SHAPE",
        help="check these and no others, before anything is timed: gate, all, or MxKxNxR such as 256x512x384x16",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 1 for a wrong result, 2 for invalid input."""
    settle_compilers()  # so that kernels that were compiled ahead are found
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return status_on_device(measure_device, parse(arguments))


if __name__ == "__main__":
    end_on_termination()
    leave(main())
