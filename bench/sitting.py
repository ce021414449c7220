"""Two short runs (sittings) on a GPU that is available for minutes: the most important measurements come first.

`python -m bench.sitting first --out DIR` records the device and its peak rates, compares launches beside each other bit
by bit with the same ones apart, tunes the most important layer, with every candidate checked against float64 first,
times the first cases with these tables, profiles when their kernels run, and times them with default blocks: five
minutes. `python -m bench.sitting second --out DIR` times all the rest and training steps of many clients: seven. The
same command continues an interrupted run; `--earlier` names the folder of an earlier sitting on another machine.

Every step is a process with a time limit, so that a hang costs only that step; unused time goes to the next one. DIR
receives <device>.json, <device>-defaults.json, tables/<device>.json (where the steps look blocks up),
tune/<device>.json, timeline/<device>.json, sitting.log with everything printed and sitting.json with the status of
every step. Triton's cache, in $TRITON_CACHE_DIR, is not cleared. `--device cpu` rehearses both under Triton's
interpreter.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from bench.cases import MAIN_OPS
from bench.harness.machine import settle_compilers
from bench.harness.options import exit_status
from bench.harness.processes import end_on_termination, leave
from bench.harness.records import write_text
from bench.report.sitting_tables import sitting_table

# How long each sitting may take, and the part of that for starting it and showing the last table.
LIMITS = {"first": 300.0, "second": 420.0}
OVERHEAD_SECONDS = 8.0
# A step gets SIGTERM this long before its limit; at the limit its processes are killed.
TERMINATION_SECONDS = 3.0
# How much less than its limit a step's `--budget-seconds` is: the time for importing torch and showing the last table.
MARGIN_SECONDS = 10.0
LOG_BYTES = 2 * 2**20
SHOWN_LINES = 3
FIRST_CASES = 13
EAGER = ("base", "peft", "inplace", "fused-apart", "fused-inplace", "fused")
# Part of the message of a step that refuses to add to records of other code or versions.
REFUSED = "--fresh starts over"


@dataclass(frozen=True)
class Step:
    """A module to run with arguments: how long it should take, and after how long it is stopped.

    A step with a `budget` is given its time as `--budget-seconds`.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    seconds: float
    limit_s: float
    budget: bool = True


@dataclass(frozen=True)
class Done:
    """The result of a step: its exit status, None if it was stopped; the seconds it took and its limit."""

    sitting: str
    step: str
    status: int | None
    seconds: float
    limit_s: float


def plan(sitting: str, out: Path, device: str, commit: str | None = None) -> tuple[Step, ...]:
    """Return the steps of a sitting, in order. Without git, records name `commit` as the code's."""
    named = () if commit is None else ("--commit", commit)
    return (_first if sitting == "first" else _second)(("--out", str(out), "--device", device, *named), device)


def _first(common: tuple[str, ...], device: str) -> tuple[Step, ...]:
    cuda = device == "cuda"
    workers = () if cuda else ("--workers", "1")
    some = (*common, *workers, "--ops", *MAIN_OPS, "dropout", "--cases", str(FIRST_CASES if cuda else 2))
    gate = ("--shapes", "4096x4096", "--ranks", "16", "--classes", "6", "--class-seconds", "6")
    tuned = gate if cuda else ("--classes", "2", "--candidates", "2")
    checks = ("--check-dtypes", "bfloat16", "mixed-bfloat16", "--check-shapes", "gate")
    eager = () if cuda else ("--providers", *EAGER)
    return (
        Step("facts", "bench.gpu", (*common, "--no-checks", "--ops", "fold", "--cases", "0"), 20, 32),
        Step("tests", "pytest", _tests(device), 55, 62, budget=False),
        Step("tuner", "bench.tune", (*common, *workers, *tuned), 60, 72),
        Step("tuned", "bench.gpu", (*some, *checks, *eager), 75, 80),
        Step("timeline", "bench.timeline", common, 12, 20),
        Step("defaults", "bench.gpu", (*some, "--defaults", "--no-checks", "--providers", *EAGER), 25, 26),
    )


def _second(common: tuple[str, ...], device: str) -> tuple[Step, ...]:
    quick = () if device == "cuda" else ("--workers", "1", "--rounds", "3", "--providers", *EAGER)
    return (Step("all", "bench.gpu", (*common, *quick), 400, 410),)


def _tests(device: str) -> tuple[str, ...]:
    """Return pytest's arguments: launches beside each other, compared bit by bit; on the CPU a few interpreted ones."""
    quiet = ("-p", "no:cacheprovider", "-v", "--maxfail", "5")
    if device == "cuda":
        return (*quiet, "-m", "gpu", "tests/plora_kernels/test_device.py", "-k", "side_by_side and 16")
    return (*quiet, "tests/plora_kernels/ops/test_numerics.py", "-k", "kernels_on_the_odd_shapes")


def environment_of(out: Path, device: str) -> dict[str, str]:
    """Return the variables that steps have in addition to this process's environment."""
    found = {"PLORA_KERNELS_CACHE": str((out / "tables").absolute()), "PYTHONUNBUFFERED": "1"}
    return found if device == "cuda" else found | {"PLORA_BACKEND": "triton", "TRITON_INTERPRET": "1"}


def sit(sitting: str, steps: Sequence[Step], out: Path, device: str, end: float) -> list[Done]:
    """Run the steps in order, each with the time that the later ones do not need; record the result of each."""
    environment = {**os.environ, **environment_of(out, device)}
    done: list[Done] = []
    for number, step in enumerate(steps):
        later = sum(other.limit_s for other in steps[number + 1 :])
        step_end = max(end - later, min(end, time.monotonic() + step.limit_s))
        try:
            done.append(_sit_through(sitting, step, out, environment, step_end))
            write_text(out / "sitting.json", json.dumps([*_earlier(out, sitting), *map(asdict, done)], indent=1) + "\n")
        except OSError:  # a full disk
            print(f"left: {', '.join(other.name for other in steps[number:])}; the same command goes on from here")
            raise
    return done


def _sit_through(sitting: str, step: Step, out: Path, environment: Mapping[str, str], end: float) -> Done:
    """Run one step; if it refuses to add to records of other code or versions, set those aside and run it again."""
    found, lines = run_step(sitting, step, out, environment, end)
    if found.status == 2 and any(REFUSED in line for line in lines):
        print(f"{step.name}: what is in {out} was made by other code or versions; it is set aside", flush=True)
        set_aside(out)
        found, lines = run_step(sitting, step, out, environment, end)
    return found


def run_step(
    sitting: str, step: Step, out: Path, environment: Mapping[str, str], end: float
) -> tuple[Done, Sequence[str]]:
    """Run one step until it ends or its time is up; return its result and the last lines it printed."""
    began = time.monotonic()
    limit_s = end - began
    budget = ("--budget-seconds", f"{max(0.0, limit_s - MARGIN_SECONDS):.0f}") if step.budget else ()
    command = [sys.executable, "-m", step.module, *step.arguments, *budget]
    print(f"{step.name}: {limit_s:.0f} s at most: python {' '.join(command[1:])}", flush=True)
    with (out / "sitting.log").open("ab") as log:
        log.write(f"\n{sitting}, {step.name}: {' '.join(command[1:])}\n".encode())
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        assert process.stdout is not None
        last: list[str] = []
        reader = threading.Thread(target=_keep, args=(process.stdout, log, last), daemon=True)
        reader.start()
        try:
            status = _wait(process, end)
        finally:
            _kill(process)
        reader.join(1.0)
        if not reader.is_alive():
            process.stdout.close()
    seconds = time.monotonic() - began
    print(f"{step.name}: {'stopped' if status is None else f'status {status}'} after {seconds:.0f} s")
    print("".join(f"    {line}\n" for line in last[-SHOWN_LINES:]), end="", flush=True)
    return Done(sitting, step.name, status, round(seconds, 1), round(limit_s, 1)), last


def _wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    """Return a process's exit status; None if it has not ended shortly before its limit and gets SIGTERM."""
    try:
        return process.wait(max(0.0, end - TERMINATION_SECONDS - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATION_SECONDS)
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children; one that hangs in its driver is not waited for."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(1.0)


def _keep(printed: IO[bytes], log: IO[bytes], last: list[str]) -> None:
    """Write what a process prints to the log, LOG_BYTES of it at most, and keep its last lines."""
    left = LOG_BYTES
    with suppress(ValueError, OSError):  # closed because the time was up, or a full disk
        for line in printed:
            last.append(line.decode(errors="replace").rstrip())
            del last[:-20]
            if left > 0:
                log.write(line)
                log.flush()
                left -= len(line)
                if left <= 0:
                    log.write(b"(the rest is left out)\n")
    for _ in printed:  # a process whose pipe is full would block
        pass


def _earlier(out: Path, sitting: str) -> list[dict[str, object]]:
    """Return the recorded results of the other sitting's steps."""
    path = out / "sitting.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [step for step in found if step["sitting"] != sitting]


def set_aside(out: Path) -> None:
    """Rename records and logs of other code or versions, to which none may be added, to "-before"."""
    logs = [*sorted((out / "tune").glob("*.json")), *sorted((out / "timeline").glob("*.json"))]
    for path in [*(path for path in sorted(out.glob("*.json")) if path.name != "sitting.json"), *logs]:
        if not path.stem.endswith("-before"):
            path.rename(path.with_name(f"{path.stem}-before.json"))


def take_up(earlier: Path, out: Path) -> None:
    """Copy the files of an earlier sitting that are not there yet."""
    for path in [path for folder in (".", "tables", "tune", "timeline") for path in earlier.glob(f"{folder}/*.json")]:
        target = out / path.relative_to(earlier)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(prog="python -m bench.sitting", description=__doc__)
    parser.set_defaults(started=time.monotonic())
    parser.add_argument("sitting", choices=list(LIMITS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="the CPU rehearses on tiny sizes")
    parser.add_argument("--earlier", type=Path, metavar="DIR", help="go on from what another sitting left there")
    parser.add_argument("--commit", help="what to call the code where git does not know")
    parser.add_argument("--limit-seconds", type=float, help="the whole sitting's limit (default: 300 and 420)")
    return parser.parse_args(arguments)


def sit_down(options: argparse.Namespace) -> int:
    """Run a sitting; return the first exit status of a step that is not 0, or 3 if one was stopped."""
    limit_s = LIMITS[options.sitting] if options.limit_seconds is None else options.limit_seconds
    options.out.mkdir(parents=True, exist_ok=True)
    if options.earlier is not None:
        take_up(options.earlier, options.out)
    steps = plan(options.sitting, options.out, options.device, options.commit)
    done = sit(options.sitting, steps, options.out, options.device, options.started + limit_s - OVERHEAD_SECONDS)
    for path in options.out.rglob("*.tmp"):  # of a process that was killed while it wrote
        path.unlink()
    print(sitting_table(options.out, [asdict(step) for step in done]), flush=True)
    statuses = [3 if step.status is None else step.status for step in done]
    return next((status for status in statuses if status), 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status, 2 for invalid input."""
    settle_compilers()  # so that the tests also find kernels that were compiled ahead
    return exit_status(sit_down, parse(arguments))


if __name__ == "__main__":
    end_on_termination()
    leave(main())
