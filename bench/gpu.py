"""Check and time everything on the device at hand, and write one file of records.

`python -m bench.gpu --out DIR` writes DIR/<device>.json. It checks the operators in every dtype against fp64, then
times every provider of every shape, the most important first, then training steps of many clients; the file is written
after each shape, so a run that is cut goes on where it stopped. Times are those of the device alone: the host is kept
ahead by what flushes the cache, and its own time a call is recorded beside them as host_us. A training step is timed
with its launches, from an idle device to an idle device.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.cases import OPS, Case
from bench.ceilings import ceilings
from bench.device_cases import device_cases
from bench.device_checks import CheckShape, check_shapes, run_checks
from bench.device_measure import Warmup, chosen_providers, measure_on_device, warm_up
from bench.device_table import summary
from bench.environment import commit_of, device_slug, environment, source_digest, usable_cores
from bench.providers import FOLD_PROVIDERS, LINEAR_PROVIDERS, is_ours
from bench.records import SIMULATION, Record, RecordFile, blank, case_key, open_records
from bench.results import ResultsError
from bench.simulation.cases import SimulationCase
from bench.simulation.device import SECONDS_EACH as SIMULATION_SECONDS
from bench.simulation.device import Simulation, device_simulations, simulate, simulation_records
from bench.timing import Plan
from bench.workers import Outcome, outcomes
from plora_kernels.configs import capability_of

PROVIDERS = tuple(dict.fromkeys([*LINEAR_PROVIDERS, *FOLD_PROVIDERS]))
# Of the whole time: what checking and compiling ahead may take before timing begins.
AHEAD_SHARE = 0.45
SECONDS_EACH = 90.0
# Starting Python and writing the last table.
RESERVE_SECONDS = 20.0
PLAN = Plan(seconds_per_provider=0.25, min_rounds=12, max_rounds=60, warmup_rounds=3)


@dataclass
class Run:
    """A run's settings and what it has found so far."""

    device: torch.device
    file: RecordFile
    providers: tuple[str, ...]
    workers: int
    started: float
    budget_s: float
    failed: dict[tuple[object, ...], dict[str, str]] = field(default_factory=dict)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        print(f"{self.elapsed():6.1f} s  {text}", flush=True)


def prepare(work: CheckShape | Warmup) -> list[dict[str, object]] | dict[str, str]:
    """Do one piece of what comes before timing: check a shape or warm a case up."""
    # Compiling runs in as many processes as there are cores already.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        return run_checks(work) if isinstance(work, CheckShape) else warm_up(work)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other processes need the memory


def check_and_compile(run: Run, checks: Sequence[CheckShape], cases: Sequence[Case]) -> None:
    """Check the operators and, in the same processes, run every provider once; record what is wrong."""
    done = run.file.done()
    work: list[CheckShape | Warmup] = [shape for shape in checks if _check_key(shape) not in done]
    if run.workers:  # alone, a process compiles a case when it comes to it
        work += [Warmup(case, run.device.type, run.providers) for case in cases]
    deadline = run.started + AHEAD_SHARE * run.budget_s
    answers = outcomes(prepare, work, workers=run.workers, seconds_each=SECONDS_EACH, deadline=deadline)
    for count, (position, outcome) in enumerate(answers, 1):
        item = work[position]
        if isinstance(item, CheckShape):
            _record_check(run, item, outcome, f"[{count}/{len(work)}]")
        else:
            _note_failures(run, item, outcome)


def _record_check(run: Run, shape: CheckShape, outcome: Outcome, count: str) -> None:
    name = f"{shape.dtype} M {shape.m} K {shape.k} N {shape.n} R {shape.r}"
    records = outcome.value
    if records is None:
        facts = {"m": shape.m, "k": shape.k, "n": shape.n, "r": shape.r, "dtype": shape.dtype}
        lost = {"status": "wrong", "cause": outcome.error}
        records = [blank(op="check", form=shape.forms()[0], provider="fused", device=shape.device, **facts) | lost]
    run.file.add(records)
    wrong = [record for record in records if record["status"] == "wrong"]
    run.say(f"{count} check {name}: {len(records) - len(wrong)} of {len(records)} forms right")
    for record in wrong:
        run.say(f"    WRONG {record['form']}: {record['cause']}")


def _note_failures(run: Run, work: Warmup, outcome: Outcome) -> None:
    """Keep what failed ahead from being run in this process, where a crash or a hang would end everything."""
    failed = outcome.value
    if outcome.error is not None:  # where the whole process ended it was one of our kernels: the others are plain torch
        chosen = chosen_providers(work.case, work.providers)
        failed = {name: outcome.error for name in chosen if is_ours(name)}
    if failed:
        run.failed[case_key(_case_facts(work.case))] = failed
        run.say(f"    FAILED {title(work.case)}: " + "; ".join(f"{name}: {cause}" for name, cause in failed.items()))


def time_cases(run: Run, cases: Sequence[Case]) -> list[Case]:
    """Time the cases in order until the time is up; return those left."""
    done, longest = run.file.done(), 2.0
    todo = [case for case in cases if case_key(_case_facts(case)) not in done]
    for count, case in enumerate(todo):
        if run.elapsed() + 1.5 * longest + RESERVE_SECONDS > run.budget_s:
            return todo[count:]
        start = time.monotonic()
        failed = run.failed.get(case_key(_case_facts(case)), {})
        records = measure_on_device(case, run.device, PLAN, run.providers, failed)
        run.file.add(records)
        longest = max(0.8 * longest, time.monotonic() - start)
        figures = (
            f"{record['provider']} {record['time_ms']:.4g}" if record["time_ms"] else f"{record['provider']} –"
            for record in records
        )
        run.say(f"[{count + 1}/{len(todo)}] {title(case)}: {', '.join(figures)} ms")
        for record in records:
            if record["status"] == "wrong":
                run.say(f"    WRONG {record['provider']}: {record['cause']}")
    return []


def time_simulations(run: Run, cases: Sequence[SimulationCase]) -> list[SimulationCase]:
    """Time training steps of many clients until the time is up; return the cases left."""
    done = run.file.done()
    work = [Simulation(case, run.device.type) for case in cases if case_key(case.facts()) not in done]
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # the process that measures needs the memory
    end = run.started + run.budget_s
    workers = 1 if run.device.type == "cuda" else 0
    answers = outcomes(
        simulate, work, workers=workers, seconds_each=SIMULATION_SECONDS, deadline=end - RESERVE_SECONDS, end=end
    )
    measured = set()
    for position, outcome in answers:
        item = work[position]
        measured.add(item.case)
        records = simulation_records(item, outcome)
        run.file.add(records)
        run.say(f"[{len(measured)}/{len(work)}] {item.case.name}: {', '.join(map(_speed, records))} clients·steps/s")
        for record in records:
            if record["status"] != "timed":
                run.say(f"    {str(record['status']).upper()} {record['provider']}: {record['cause']}")
    return [item.case for item in work if item.case not in measured]


def _speed(record: Record) -> str:
    speed = record.get("clients_steps_per_second")
    return f"{record['provider']} {f'{speed:.4g}' if speed else '–'}"


def title(case: Case) -> str:
    """Return a case in words."""
    rows = f"M {case.m} " if case.m else ""
    return f"{case.op} {case.projection.k}×{case.projection.n} {rows}R {case.r} {case.dtype}"


def _case_facts(case: Case) -> dict[str, object]:
    k, n = case.projection.k, case.projection.n
    return {"op": case.op, "m": case.m, "k": k, "n": n, "r": case.r, "dtype": case.dtype}


def _check_key(shape: CheckShape) -> tuple[object, ...]:
    facts = {"m": shape.m, "k": shape.k, "n": shape.n, "r": shape.r, "dtype": shape.dtype}
    return case_key({"op": "check", "form": shape.forms()[0], **facts})


def describe(device: torch.device, commit: str | None) -> dict[str, object]:
    """Return the meta record: the device, versions, what code ran, how it was timed."""
    found = environment(device, threads=torch.get_num_threads())
    found["date"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    found["commit"], found["source"] = commit or commit_of(Path.cwd()), source_digest()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"], found["l2_bytes"] = properties.total_memory, getattr(properties, "L2_cache_size", None)
        found["capability"] = capability_of(device)
    return found


def measure_kernels() -> None:
    """Ask for the kernels by name, in this process and its workers: one that does not compile raises, not gives way."""
    os.environ.setdefault("PLORA_BACKEND", "triton")


def default_workers(device: torch.device) -> int:
    """Return how many processes check and compile ahead: several on a GPU, none on the CPU."""
    return max(1, min(10, usable_cores() - 2)) if device.type == "cuda" else 0


def measure_device(options: argparse.Namespace) -> int:
    """Check, time and write; return 0, or 1 if a result was wrong."""
    device = torch.device(options.device)
    path = options.out / f"{device_slug(device)}.json"
    run = Run(
        device,
        open_records(path, describe(device, options.commit), fresh=options.fresh),
        tuple(options.providers),
        default_workers(device) if options.workers is None else options.workers,
        options.started,
        options.budget_seconds,
    )
    run.say(f"{run.file.meta['device_name']}; {len(run.file.records)} records in {path}")
    cases = [case for case in device_cases(device.type) if case.op in options.ops]
    todo = [case for case in cases if case_key(_case_facts(case)) not in run.file.done()]
    if "ceilings" not in run.file.meta:
        run.file.meta["ceilings"] = ceilings(device)
        run.file.save()
    run.say(", ".join(f"{name} {value:.4g}" for name, value in run.file.meta["ceilings"].items()))
    check_and_compile(run, () if options.no_checks else check_shapes(device.type), todo)
    left = [title(case) for case in time_cases(run, todo)]
    if SIMULATION in options.ops:
        left += [case.name for case in time_simulations(run, device_simulations(device.type))]
    print(summary(run.file.meta, run.file.records))
    wrong = [record for record in run.file.records if record.get("status") == "wrong"]
    run.say(f"{path}: {len(run.file.records)} records, {len(wrong)} wrong, {len(left)} cases left")
    if left:
        print("left: " + "; ".join(left))
        print("the same command goes on from here")
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where <device>.json goes")
    parser.add_argument("--device", default=default, choices=["cuda", "cpu"], help="the CPU tries it out on tiny sizes")
    parser.add_argument("--budget-seconds", type=float, default=480.0, help="end by then; another call goes on")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on")
    parser.add_argument("--ops", nargs="+", default=[*OPS, SIMULATION], choices=[*OPS, SIMULATION])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--no-checks", action="store_true", help="only check what is timed")
    parser.add_argument("--workers", type=int, help="processes that check and compile ahead (0: none)")
    parser.add_argument("--commit", help="what to call the code where git does not know")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 1 for a wrong result, 2 for input that cannot be used."""
    started = time.monotonic()
    # Triton 3.9 asks for a choice; fused multiply-add is what it has always done.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    options = parse(arguments)
    options.started = started
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("error: there is no CUDA device; --device cpu tries the command out", file=sys.stderr)
            return 2
        measure_kernels()
    try:
        return measure_device(options)
    except (ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
