"""A run whose disk is full, fails or cannot be written ends with one line, and goes on once the disk is well again."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

import fed.simulation.rounds
from tests.support.children import Ending, Tell, in_child
from tests.support.file_events import FileEvent, watch
from tests.support.interrupted_runs import CASES, Case, Tally, attempt, differences, fresh, go_on, prepared, result_of

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

# What a full disk does not do any more. A read-only one changes nothing, and a failing one may fail in anything.
_NEEDS_SPACE = ("open", "write", "sync", "sync folder", "mkdir", "symlink", "link")
KINDS = {
    "the disk is full": (errno.ENOSPC, True, _NEEDS_SPACE),
    "the disk is full for a moment": (errno.ENOSPC, False, _NEEDS_SPACE),
    "the disk becomes read-only": (errno.EROFS, True, None),
    "the disk fails once": (errno.EIO, False, None),
}


class Failing:
    """Lets an event fail, and with `lasting` all later ones of the same kinds (None: of all kinds)."""

    def __init__(self, first: int, number: int, lasting: bool, kinds: tuple[str, ...] | None) -> None:
        self._first, self._error, self._lasting, self._kinds = first, number, lasting, kinds

    def __call__(self, event: FileEvent) -> None:
        if event.number < self._first or (event.number > self._first and not self._lasting):
            return
        if self._kinds is not None and event.kind not in self._kinds:
            return
        if event.kind == "write":
            raise SafetensorError(f"I/O error: {os.strerror(self._error)} (os error {self._error})")
        path = None if event.kind.startswith("sync") else str(event.paths[0])
        raise OSError(self._error, os.strerror(self._error), path)


def play_in_child(case: Case, directory: Path, prepare: Callable[[], object]) -> Ending:
    """Play the run in a child after `prepare`; the value is the line that it is refused with, or "" if it is not."""

    def work(tell: Tell) -> str:
        prepare()
        return attempt(lambda: case.play(directory, bool(case.begun), lambda row: tell(row["round"])))[1]

    return in_child(work)


class Trial:
    """A case's directories, and what the run ends with if nothing fails."""

    def __init__(self, case: Case, folder: Path, directory: Path | None = None) -> None:
        self.case = case
        self._begun, self.directory, self.wanted = prepared(case, folder, directory)

    def play(self, prepare: Callable[[], object]) -> Ending:
        """Play the run from its beginning in a child."""
        fresh(self.directory, self._begun)
        return play_in_child(self.case, self.directory, prepare)

    def outcome(self, ending: Ending, reason: str) -> str:
        """Return how the run came out: that it ended, or was refused and then went on."""
        if not ending.value:
            differing = differences(result_of(self.directory), self.wanted)
            assert not differing, f"it counts as played, but {differing}"
            return "played on"
        assert reason in ending.value, f"refused with {ending.value!r}, not with {reason!r}"
        return "refused, then " + go_on(self.case, self.directory, self.wanted, max(ending.told, default=-1))

    def events(self) -> list[FileEvent]:
        """Return the events of the run where nothing fails."""
        seen: list[FileEvent] = []

        def work(tell: Tell) -> list[FileEvent]:
            watch(self.directory.parent, seen.append)
            self.case.play(self.directory, bool(self.case.begun))
            return list(seen)

        fresh(self.directory, self._begun)
        return in_child(work).value


def check(case: Case, kind: str, folder: Path, stride: int, tally: Tally) -> None:
    trial, (number, lasting, kinds) = Trial(case, folder), KINDS[kind]
    possible = [event for event in trial.events() if kinds is None or event.kind in kinds]
    for event in possible[stride // 2 :: stride]:
        failing = Failing(event.number, number, lasting, kinds)
        with tally.fault(f"{kind} at {event}") as came_out:
            ending = trial.play(lambda failing=failing: watch(trial.directory.parent, failing))
            came_out(trial.outcome(ending, os.strerror(number)))
    tally.check()


@pytest.mark.parametrize("kind", list(KINDS)[:3:2])
def test_a_run_goes_on_after_an_error_of_the_disk(kind: str, tmp_path: Path, tally: Tally) -> None:
    check(CASES["fed-plora-personal"], kind, tmp_path, 25, tally)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fed-plora-personal", "flora-longer"])
def test_a_run_goes_on_after_an_error_of_the_disk_at_any_change(
    name: str, kind: str, tmp_path: Path, tally: Tally
) -> None:
    check(CASES[name], kind, tmp_path, 3, tally)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedsa-lora", "flora"])
def test_a_run_whose_files_may_not_grow_goes_on(name: str, tmp_path: Path, tally: Tally) -> None:
    trial = Trial(CASES[name], tmp_path)

    def limit(size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    for size in range(100, 4000, 130):
        with tally.fault(f"no file larger than {size} bytes") as came_out:
            came_out(trial.outcome(trial.play(lambda size=size: limit(size)), os.strerror(errno.EFBIG)))
    tally.check()


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """Mount a file system in memory, and yield a function that sets its size in KiB."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=False, capture_output=True).returncode
    if mounted != 0:
        pytest.skip("nothing can be mounted here")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("name", ["fedsa-lora", "flora"])
def test_a_run_on_a_disk_that_is_too_small_goes_on(name: str, tmp_path: Path, tally: Tally) -> None:
    with small_disk(tmp_path / "disk") as resize:
        trial = Trial(CASES[name], tmp_path)
        for size in range(4, 120, 4):
            shutil.rmtree(trial.directory, ignore_errors=True)
            resize(size)
            with tally.fault(f"a disk of {size} KiB") as came_out:
                ending = trial.play(lambda: None)
                resize(10_000)
                came_out(trial.outcome(ending, os.strerror(errno.ENOSPC)))
    tally.check()


@pytest.mark.parametrize("name", ["fedsa-lora"])
def test_a_run_goes_on_after_memory_ran_out(name: str, tmp_path: Path, tally: Tally) -> None:
    trial, train = Trial(CASES[name], tmp_path), fed.simulation.rounds.train

    def run_out(number: int) -> None:
        calls = iter(range(1, number))

        def short_of_memory(*arguments: object) -> object:
            if next(calls, None) is None:
                raise MemoryError
            return train(*arguments)

        fed.simulation.rounds.train = short_of_memory

    for number in range(1, 7):
        with tally.fault(f"no memory for client {number}") as came_out:
            came_out(trial.outcome(trial.play(lambda number=number: run_out(number)), "out of memory"))
    tally.check()
