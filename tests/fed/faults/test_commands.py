"""Commands that are killed or interrupted at any change of files: the old run or the new one is there, whole."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fed import config as configuration
from tests.support.children import KILLED, die
from tests.support.command_line import Outcome
from tests.support.commands_in_children import TINY, command, command_events, command_here
from tests.support.file_events import FileEvent
from tests.support.interrupted_runs import Tally, differences, result_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.usefixtures("undrawn_throughout"),
]

INTERRUPTED = 130


def run_arguments(seed: int, out: Path, *options: str) -> list[str]:
    return ["run", "digits", "--no-centralised", *options, "--out", str(out), "--set", *TINY, f"seed={seed}"]


def resume(out: Path) -> Outcome:
    return command("resume", "--no-centralised", str(out))


def results(out: Path) -> dict[str, object]:
    """Return the files of a run, without its report."""
    return {name: content for name, content in result_of(out).items() if not name.startswith("report.")}


class Runs:
    """Two finished runs, by seed; `put` makes an output directory with the one of seed 0 in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.wanted = {}
        for seed in (0, 1):
            outcome = command_here(*run_arguments(seed, folder / str(seed)))
            assert outcome.status == 0, outcome.err
            self.wanted[seed] = results(folder / str(seed))

    def put(self, out: Path, there: bool) -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir(parents=True)
        if there:
            shutil.copytree(self._folder / "0", out)

    def check(self, out: Path, seeds: tuple[int, ...]) -> str:
        """Check that `out` is one of these runs, or goes on to be, and that nothing is left beside it."""
        outcome = resume(out)
        assert outcome.status == 0, f"it does not go on: {outcome.err}"
        seed = configuration.load_saved(out / "config.toml").seed
        assert seed in seeds, f"the run of seed {seed} is there, not that of {seeds}"
        differing = differences(results(out), self.wanted[seed])
        assert not differing, f"the run of seed {seed} went on, but {differing}"
        beside = [path.name for path in out.parent.iterdir() if path != out and not path.name.endswith(".lock")]
        assert not beside, f"left beside the run: {beside}"
        return "the new run" if seed else "the old run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, undrawn_throughout: None) -> Runs:
    return Runs(tmp_path_factory.mktemp("whole"))


def at(number: int, act: Callable[[], object]) -> Callable[[FileEvent], object]:
    return lambda event: act() if event.number == number else None


@pytest.mark.parametrize("first", ["report", "resume", "run"])
def test_a_killed_overwrite_leaves_the_old_run_or_the_new(first: str, runs: Runs, tmp_path: Path, tally: Tally) -> None:
    """`first` is the command that comes next: each of them must put things in order."""
    out = tmp_path / "runs" / "digits"
    overwrite = run_arguments(1, out, "--overwrite")
    runs.put(out, True)
    events = command_events(out.parent, *overwrite)
    offset = ("report", "resume", "run").index(first)
    for event in events[2 * offset :: 6]:
        with tally.fault(f"killed at {event.number} {event.kind} of {len(events)}") as came_out:
            runs.put(out, True)
            assert command(*overwrite, root=out.parent, before=at(event.number, die)).status == KILLED
            if first == "report":
                assert command("report", str(out)).status == 0
            if first == "run":
                assert command(*overwrite).status == 0
            came_out(runs.check(out, (1,) if first == "run" else (0, 1)))
    tally.check()


def test_a_killed_run_is_resumed_or_started_anew(runs: Runs, tmp_path: Path, tally: Tally) -> None:
    out = tmp_path / "runs" / "digits"
    runs.put(out, False)
    events = command_events(tmp_path, *run_arguments(1, out))
    for event in events[::4]:
        with tally.fault(f"killed at {event.number} {event.kind} of {len(events)}") as came_out:
            runs.put(out, False)
            ending = command(*run_arguments(1, out), root=out.parent, before=at(event.number, die))
            assert ending.status in (KILLED, 0)
            resumed = resume(out)
            if resumed.status != 0:
                assert re.fullmatch(r"error: .+\n", resumed.err), resumed.err
                again = command(*run_arguments(1, out, "--overwrite"))
                assert again.status == 0, f"{resumed.err} then {again.err}"
            came_out(("resumed: " if resumed.status == 0 else "started anew: ") + runs.check(out, (1,)))
    tally.check()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("there", [True, False], ids=["overwrite", "new"])
def test_an_interrupted_command_says_so_in_one_line(
    name: str, there: bool, runs: Runs, tmp_path: Path, tally: Tally
) -> None:
    out = tmp_path / "runs" / "digits"
    arguments = run_arguments(1, out, *["--overwrite"] * there)
    runs.put(out, there)
    events = command_events(out.parent, *arguments)
    for event in events[::7]:
        with tally.fault(f"{name} at {event.number} {event.kind} of {len(events)}") as came_out:
            runs.put(out, there)
            send = at(event.number, lambda: os.kill(os.getpid(), signal.Signals[name]))
            ending = command(*arguments, root=out.parent, before=send)
            assert ending.status == INTERRUPTED, f"status {ending.status}: {ending.err}"
            assert re.fullmatch(r"\S.*\n", ending.err), f"not one line: {ending.err!r}"
            assert "interrupted" in ending.err
            if there or out.exists():
                came_out(runs.check(out, (0, 1) if there else (1,)))
            else:
                assert not list(out.parent.iterdir()), "something hidden is left"
                came_out("nothing is left")
    tally.check()
