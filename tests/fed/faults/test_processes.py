"""Real processes that are killed or interrupted at random times, and two of them in one directory."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fed.errors import FedError
from tests.support.children import Tell, in_child
from tests.support.command_line import Outcome
from tests.support.commands_in_children import TINY, command, command_here
from tests.support.interrupted_runs import CASES, Tally, differences, files_of, result_of
from tests.support.processes import Process, alive

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes in /proc"),
]

ROUNDS = 8
INTERRUPTED = 130


def run_arguments(out: Path, *options: str, seed: int = 0) -> list[str]:
    settings = [*TINY, f"rounds={ROUNDS}", f"seed={seed}"]
    return ["run", "digits", "--no-centralised", *options, "--out", str(out), "--set", *settings]


def results(out: Path) -> dict[str, object]:
    """Return the files of a run without its report and without the checkpoints."""
    skipped = ("report.", "checkpoint/", "similarity.png")
    return {name: content for name, content in result_of(out).items() if not name.startswith(skipped)}


def finish(out: Path, wanted: dict[str, object], *arguments: str) -> Outcome:
    """Let a command end a run, and check the run; it is called in a child, which need not import everything again."""
    outcome = command(*(arguments or ("resume", "--no-centralised", str(out))))
    if outcome.status == 0:
        differing = differences(results(out), wanted)
        assert not differing, f"it ended, but {differing}"
    return outcome


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, undrawn_throughout: None) -> dict[str, object]:
    """The files of a run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    outcome = command_here(*run_arguments(out))
    assert outcome.status == 0, outcome.err
    return results(out)


def moment(process: Process, out: Path, number: int) -> str:
    """Wait for a random moment: by turns at any time, or soon after a random row has been written."""
    draw = random.Random(number)
    if number % 3 == 0:
        time.sleep(share := draw.random() * 8)
        return f"{share:.2f} s"
    last, delay = draw.randrange(ROUNDS), draw.random() * 0.2
    process.until(lambda: (out / "rounds.jsonl").exists() and len(rows_so_far(out)) > last)
    time.sleep(delay)
    return f"{delay:.2f} s after row {last}"


def rows_so_far(out: Path) -> list[str]:
    """Return the lines of the rows that are there, without one that is being written."""
    return (out / "rounds.jsonl").read_text().split("\n")[:-1]


@pytest.mark.slow
def test_a_run_killed_at_a_random_time_goes_on(whole: dict[str, object], tmp_path: Path, tally: Tally) -> None:
    for number in range(12):
        out = tmp_path / str(number) / "run"
        with tally.fault(f"kill {number}") as came_out:
            with Process(out.parent / "log", *run_arguments(out)) as process:
                when = moment(process, out, number)
                process.send(signal.SIGKILL)
                killed = process.wait()
            assert killed.status in (-signal.SIGKILL, 0), killed.err
            came_out(_gone_on(out, whole, when))
    tally.check()


def _gone_on(out: Path, whole: dict[str, object], when: str) -> str:
    resumed = finish(out, whole)
    if resumed.status == 0:
        return "identical"
    assert re.fullmatch(r"error: .+\n", resumed.err), f"{when}: {resumed.err}"
    reached = len(rows_so_far(out)) if (out / "rounds.jsonl").exists() else 0
    assert reached <= 1, f"{when}: {reached} rows, but {resumed.err}"
    again = finish(out, whole, *run_arguments(out, "--overwrite"))
    assert again.status == 0, f"{when}: {again.err}"
    return "anew"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_interrupted_at_a_random_time_says_so_and_goes_on(
    name: str, whole: dict[str, object], tmp_path: Path, tally: Tally
) -> None:
    for number in range(6):
        out = tmp_path / str(number) / "run"
        with tally.fault(f"{name} {number}") as came_out:
            with Process(out.parent / "log", *run_arguments(out)) as process:
                assert process.until(lambda: process.handles_signals), "it has no handler of SIGTERM"
                when = moment(process, out, number)
                process.send(signal.Signals[name])
                ended = process.wait(30)
            if ended.status == 0:  # the run was over
                came_out("over before")
                continue
            assert ended.status == INTERRUPTED, f"{when}: status {ended.status}: {ended.err}"
            assert re.fullmatch(r".*interrupted.*\n", ended.err), f"{when}: {ended.err!r}"
            came_out(_gone_on(out, whole, when) if out.exists() else "nothing is left")
    tally.check()


def live(out: Path) -> Process:
    """Start a run and stop it, as Ctrl-Z does, after some rounds."""
    process = Process(out.parent / "log", *run_arguments(out))
    process.until(lambda: (out / "rounds.jsonl").exists() and len(rows_so_far(out)) > 2)
    process.send(signal.SIGSTOP)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("second", ["resume", "overwrite"])
def test_a_second_process_is_refused_while_the_first_lives(
    second: str, whole: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = run_arguments(out, "--overwrite", seed=1) if second == "overwrite" else ("resume", str(out))
    with live(out) as first:
        before = files_of(out)
        with Process(tmp_path / "log", *arguments) as other:
            refused = other.wait()
        assert refused.status == 2, refused.err
        assert re.fullmatch(rf"error: .*\b{first.pid}\b.*\n", refused.err), refused.err
        assert files_of(out) == before
        first.send(signal.SIGCONT)
        assert first.wait().status == 0
    assert not differences(results(out), whole)
    assert finish(out, whole).status == 0


@pytest.mark.slow
def test_of_two_that_resume_at_once_one_plays(whole: dict[str, object], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with live(out) as first:
        first.send(signal.SIGKILL)
        first.wait()
    again = ("resume", "--no-centralised", str(out))
    with Process(tmp_path / "log", *again) as one, Process(tmp_path / "log", *again) as two:
        outcomes = {one.pid: one.wait(), two.pid: two.wait()}
    played = [pid for pid, outcome in outcomes.items() if outcome.status == 0]
    for outcome in outcomes.values():
        if outcome.status:  # unless the other was over before this one began
            assert re.fullmatch(rf"error: .*\b{played[0]}\b.*\n", outcome.err), outcome.err
    assert played
    assert not differences(results(out), whole)


def test_a_directory_belongs_to_one_process(tmp_path: Path) -> None:
    """A child holds the run in its second round while this process tries to go on with it."""
    case, directory = CASES["fedsa-lora"], tmp_path / "run"
    held, free = os.pipe(), os.pipe()

    def hold(row: dict) -> None:
        if row["round"] == 1:
            os.write(held[1], b"held")
            os.read(free[0], 1)

    pid = os.fork()
    if pid == 0:
        try:
            case.play(directory, False, hold)
        finally:
            os._exit(0)
    try:
        assert os.read(held[0], 4) == b"held"
        before = files_of(directory)
        for resume in (True, False):
            with pytest.raises(FedError, match=rf"\b{pid}\b"):
                case.play(directory, resume)
        assert files_of(directory) == before
    finally:
        os.write(free[1], b"x")
        os.waitpid(pid, 0)
    case.play(tmp_path / "whole", False)
    case.play(directory, True)
    assert not differences(result_of(directory), result_of(tmp_path / "whole"))


def compare_arguments(out: Path, jobs: int) -> list[str]:
    methods = ["--methods", "fed-plora,flora", "--seeds", "0,1", "--jobs", str(jobs)]
    return ["compare", "digits", *methods, "--out", str(out), "--set", *TINY, f"rounds={ROUNDS}"]


def compared(out: Path) -> dict[str, object]:
    """Return the files of a comparison's runs, without checkpoints, base models and reports."""
    kept = ("rounds.jsonl", "adapter_model.safetensors", "base_delta.safetensors")
    return {name: content for name, content in result_of(out).items() if name.endswith(kept)}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory, undrawn_throughout: None) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("comparison")
    outcome = command_here(*compare_arguments(folder / "whole", 1))
    assert outcome.status == 0, outcome.err
    return compared(folder / "whole")


def begun(out: Path, process: Process, rows: int) -> None:
    """Wait until the runs of a comparison have so many rows together."""
    process.until(lambda: sum(len(rows_so_far(path.parent)) for path in out.glob("runs/*/seed-*/rounds.jsonl")) >= rows)


def gone(pids: Sequence[int], seconds: float) -> bool:
    """Wait until processes have ended, and return whether they have."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 9])
def test_the_workers_of_a_killed_comparison_end(rows: int, comparison: dict[str, object], tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    with Process(tmp_path / "log", *compare_arguments(out, 2)) as process:
        begun(out, process, rows)
        workers = process.children()
        assert len(workers) >= 2
        process.send(signal.SIGKILL)
        process.wait()
        assert gone(workers, 5), "workers play on without their parent"
    outcome = finish_comparison(out)
    assert outcome.status == 0, outcome.err
    assert not differences(compared(out), comparison)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_comparison_calls_no_run_failed(
    name: str, jobs: int, comparison: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    with Process(tmp_path / "log", *compare_arguments(out, jobs)) as process:
        begun(out, process, 9)
        process.send(signal.Signals[name])
        outcome = process.wait(30)
    assert outcome.status == INTERRUPTED, outcome.err
    assert re.fullmatch(r".*interrupted.*\n", outcome.err), outcome.err
    assert "failed" not in outcome.out + outcome.err
    assert finish_comparison(out).status == 0
    assert not differences(compared(out), comparison)


def finish_comparison(out: Path) -> Outcome:
    return command("resume", str(out))


def test_what_a_child_raises_is_raised_here() -> None:
    def work(tell: Tell) -> None:
        raise FedError("this is what")

    with pytest.raises(AssertionError, match="FedError: this is what"):
        in_child(work)
