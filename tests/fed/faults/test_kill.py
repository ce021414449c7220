"""A run whose process dies at any change of its files goes on and ends like one that was never interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.children import KILLED, Ending, Tell, die, in_child
from tests.support.file_events import FileEvent, watch
from tests.support.interrupted_runs import CASES, Case, Tally, fresh, go_on, prepared, result_of

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Killer:
    """Ends the process at an event: before it, or, with `cut`, with half of what was written last in the file."""

    def __init__(self, last: int, cut: bool) -> None:
        self._last, self._cut = last, cut
        self._sizes: dict[Path, int] = {}  # of files whose newest content has not been flushed: the size before

    def __call__(self, event: FileEvent) -> None:
        path = event.paths[0]
        if event.number == self._last:
            if self._cut:
                self._shorten(path)
            die()
        if event.kind in ("open", "write"):
            self._sizes[path] = 0 if event.truncates or not path.exists() else path.stat().st_size
        elif event.kind == "sync":
            self._sizes[path] = path.stat().st_size

    def _shorten(self, path: Path) -> None:
        before, size = self._sizes.get(path), path.stat().st_size
        if before is not None:
            with path.open("r+b") as file:
                file.truncate(before + (size - before) // 2)


def events_of(case: Case, directory: Path, resume: bool) -> list[FileEvent]:
    """Play the run in a child and return its events."""

    def work(tell: Tell) -> list[FileEvent]:
        seen: list[FileEvent] = []
        watch(directory.parent, seen.append)
        case.play(directory, resume)
        return list(seen)

    return in_child(work).value


def killed(case: Case, directory: Path, resume: bool, last: int, cut: bool) -> Ending:
    """Play the run in a child that dies at an event; the rounds that it told are those passed to `on_round`."""

    def work(tell: Tell) -> None:
        watch(directory.parent, Killer(last, cut))
        case.play(directory, resume, lambda row: tell(row["round"]))

    return in_child(work)


def points(events: Sequence[FileEvent], stride: int) -> list[tuple[FileEvent, bool]]:
    """Return every `stride`-th way to die: at each event, and before each flush of a file also with a part of it."""
    ways = [(event, cut) for event in events for cut in (False, True) if not cut or event.kind == "sync"]
    return ways[stride // 2 :: stride]


def check(case: Case, folder: Path, stride: int, tally: Tally) -> None:
    begun, directory, wanted = prepared(case, folder)
    events = events_of(case, fresh(directory, begun), bool(case.begun))
    assert result_of(directory) == wanted
    for event, cut in points(events, stride):
        with tally.fault(f"killed at {event}{' with a part of it' * cut}") as came_out:
            ending = killed(case, fresh(directory, begun), bool(case.begun), event.number, cut)
            assert ending.status == KILLED
            came_out(go_on(case, directory, wanted, max(ending.told, default=-1)))
    tally.check()


@pytest.mark.parametrize("name", ["fed-plora-personal", "flora-longer"])
def test_a_killed_run_goes_on(name: str, tmp_path: Path, tally: Tally) -> None:
    check(CASES[name], tmp_path, 15, tally)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_many_changes_of_its_files_goes_on(name: str, tmp_path: Path, tally: Tally) -> None:
    check(CASES[name], tmp_path, 2, tally)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fed-plora-personal", "fedsa-lora-every-2", "flora-longer"])
def test_a_run_killed_again_while_it_goes_on_goes_on(name: str, tmp_path: Path, tally: Tally) -> None:
    """Every thirteenth way to die, and from there on every fifteenth way to die while the run is resumed."""
    case, begun, whole = CASES[name], tmp_path / "begun", tmp_path / "whole"
    first, directory = tmp_path / "first" / "run", tmp_path / "disk" / "run"
    first.parent.mkdir()
    directory.parent.mkdir()
    case.begin(begun)
    case.play(fresh(whole, begun), bool(case.begun))
    wanted: dict[str, Any] = result_of(whole)
    for event, cut in points(events_of(case, fresh(first, begun), bool(case.begun)), 13):
        once = killed(case, fresh(first, begun), bool(case.begun), event.number, cut)
        if not (first / "checkpoint").exists() or not list((first / "checkpoint").glob("round-*[0-9]")):
            continue
        for again, cut_again in points(events_of(case, fresh(directory, first), True), 15):
            with tally.fault(f"killed at {event}, then at {again}{' with a part of it' * cut_again}") as came_out:
                ending = killed(case, fresh(directory, first), True, again.number, cut_again)
                assert ending.status == KILLED
                came_out(go_on(case, directory, wanted, max([*once.told, *ending.told], default=-1)))
    tally.check()
