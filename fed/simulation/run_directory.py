"""The directory of a run: created as a whole, replacing nothing but an earlier run, and read back into a `Run`."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from fed import config as configuration
from fed.config import RunConfig
from fed.errors import FedError
from fed.files import sync, write_atomically
from fed.locks import LOCK, held, is_held
from fed.simulation import checkpoint
from fed.simulation.finished import (
    CENTRALISED,
    FINISHED,
    check_centralised,
    mark_centralised,
    row_seal,
    settings_of_end,
)
from fed.simulation.rows import ROUNDS, complete_lines, parse_rows, sealed_lines
from fed.simulation.settings import changed_setting, fixed_settings
from fed.types import CentralisedRow, Metrics, Row

CONFIG, BASE = "config.toml", "base"
# The endings of a run's directory before it is in its place, of one that is being replaced, and of one that is deleted.
_NEW, _OLD, _GONE = ".tmp", ".old", ".gone"
_UNBORN = ".unborn"  # a file in a run that is in its place but has not yet replaced the earlier one for good


def require_free(target: Path, overwrite: bool) -> None:
    """Raise FedError unless `target` does not exist, or `overwrite` is set and it is empty or a run's directory."""
    try:
        place, here = target.resolve(), Path.cwd().resolve()
    except (OSError, RuntimeError):  # which pathlib raises for links that lead to themselves
        raise FedError(f"--out is {str(target)!r}, which is no place for a directory; give another name") from None
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FedError(f"--out is {str(target)!r}, which is not a directory; give another name")
    if place in (here, *here.parents):
        raise FedError(f"--out is {str(target)!r}, which holds the working directory; give another name")
    if not target.exists():
        return
    if not overwrite:
        raise FedError(f"--out is {str(target)!r}, which exists; --overwrite replaces it, or give another name")
    holds_run = (target / CONFIG).is_file() and (target / ROUNDS).is_file()  # the two files that every run has
    if any(path.name != LOCK for path in target.iterdir()) and not holds_run:
        raise FedError(
            f"--out is {str(target)!r}, which --overwrite leaves alone: it holds no {CONFIG} and {ROUNDS}, "
            "so it is not a run's directory"
        )


class RunDirectory:
    """A context manager that creates a run's directory, and removes it again unless the run gets under way.

    `path` is the directory to write to, at first a temporary one beside `target`. `publish`, called when the first row
    is ready, moves it to `target` and an earlier run at `target` aside. `commit`, called when that row is written,
    deletes the earlier run. If the context is left without `commit`, the new directory is deleted and the earlier run
    is at `target`. A process that is killed may leave both; `recover` then puts them in order. Both directories are
    held against other processes.
    """

    def __init__(self, target: Path, overwrite: bool, on_event: Callable[[str], object] | None = None) -> None:
        if ".." in target.parts:
            target = Path(os.path.normpath(target))
        recover(target, on_event)
        require_free(target, overwrite)
        self.target = target
        self.path = target
        self._created = self._replaces = False
        self._made: list[Path] = []
        self._aside: Path | None = None
        self._locks = ExitStack()
        self.kept = False

    def __enter__(self) -> Self:
        missing = [parent for parent in self.target.parents if not parent.exists()]
        try:
            for parent in reversed(missing):
                parent.mkdir()
                self._made.append(parent)
            self.path = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=_NEW, dir=self.target.parent))
            self._name, self._created = self.path, True
            self.path.chmod(0o755)
            self._locks.enter_context(held(self.path))
            self._replaces = self.target.exists()
            if self._replaces:
                self._locks.enter_context(held(self.target))
        except OSError as error:
            self._undo()
            raise FedError(f"--out is {str(self.target)!r}: it cannot be written: {error.strerror}") from None
        except BaseException:
            self._undo()
            raise
        return self

    def publish(self) -> None:
        """Move the directory to `target`, which `path` is from now on."""
        (self.path / _UNBORN).touch()
        sync([self.path])
        try:
            if self._replaces:
                self._aside = self.target.rename(self.path.with_suffix(_OLD))
            self.path.rename(self.target)
        except OSError as error:  # for example because another process has made it meanwhile
            raise FedError(f"--out is {str(self.target)!r}: it cannot be written: {error.strerror}") from None
        self.path = self.target
        sync([self.target.parent, *(made.parent for made in self._made)])

    def commit(self) -> None:
        """Make the run's directory final and delete the one that it replaces; calling it again changes nothing."""
        if self.kept:
            return
        self.kept = True
        if self._aside is not None:
            _delete(self._aside)
            self._aside = None
        (self.path / _UNBORN).unlink()

    def __exit__(self, *error: object) -> None:
        if not self.kept:
            self._undo()
        self._locks.close()

    def _undo(self) -> None:
        if self._created:
            with suppress(OSError):
                _delete(self.path if self.path != self.target else self._withdrawn())
        if self._aside is not None:
            self._aside.rename(self.target)
        for parent in reversed(self._made):
            if not any(parent.iterdir()):
                parent.rmdir()
        self._locks.close()

    def _withdrawn(self) -> Path:
        """Move the new run out of its place again, and return where it is."""
        return self.target.rename(self._name.with_suffix(_NEW))


def _delete(directory: Path) -> None:
    """Delete a directory beside a run; one that is deleted in part is never taken for a run."""
    gone = directory.with_suffix(_GONE)
    directory.rename(gone)
    shutil.rmtree(gone)


def recover(target: Path, on_event: Callable[[str], object] | None = None) -> None:
    """Finish or undo what a process left that was killed while it made or replaced the run in `target`.

    A new run without a checkpoint is deleted, and the run that it was to replace is at `target` again; once it has one,
    the old run is deleted. What another process holds is left alone, and so is a run that was to be replaced if
    something else is at `target` by now.
    """
    for path in _beside(target):
        if path.suffix == _GONE:
            shutil.rmtree(path)
        elif not (path / LOCK).is_file() or is_held(path) or (target.is_dir() and is_held(target)):
            continue
        elif path.suffix == _OLD and target.exists() and not (target / _UNBORN).exists():
            if on_event is not None:
                on_event(f"{path} is a run that was to be replaced, but {target} is not what was to replace it")
        elif path.suffix == _OLD and checkpoint.last_round(target) is None:
            if target.is_dir():
                _delete(target.rename(path.with_suffix(_NEW)))
            path.rename(target)
            if on_event is not None:
                on_event(f"{target}: the run that was to replace this one was killed too early; this one is put back")
        else:
            _delete(path)
    if (target / _UNBORN).is_file() and not is_held(target) and not any(map(_is_aside, _beside(target))):
        (target / _UNBORN).unlink()  # there is nothing left that the run is to replace


def _beside(target: Path) -> list[Path]:
    """Return the directories that a process made beside a run's directory, and left if it was killed."""
    if not target.parent.is_dir():
        return []
    made = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(tmp|old|gone)")
    return sorted(path for path in target.parent.iterdir() if made.fullmatch(path.name) and not path.is_symlink())


def _is_aside(path: Path) -> bool:
    return path.suffix == _OLD


@dataclass(frozen=True)
class Run:
    """The contents of a run's directory: its configuration, its rows (row 0 first) and the centralised LoRA results.

    `centralised` holds rows of steps, accuracy (0 … 1), loss and train_seconds, or is empty if that was not run.
    """

    config: RunConfig
    rows: list[Row]
    centralised: list[CentralisedRow]

    def gain_of(self, row: Metrics) -> float | None:
        """Return the accuracy of `row` minus that of the unadapted model, in percentage points; None if not measured.

        The accuracy of answers is not measured in every round with `measure.generate = "last"`.
        """
        first, reached = self.rows[0]["accuracy"], row["accuracy"]
        return None if first is None or reached is None else 100 * float(reached - first)


def read(directory: Path) -> Run:
    """Read a run's files, without an incomplete last row; raise FedError if the directory is not that of a run.

    So does a file that was damaged since a checkpoint, or the end of the run, took its digest.
    """
    config = read_config(directory)
    saved = settings_of_end(directory) or checkpoint.saved_settings(directory)
    if saved and (changed := changed_setting(saved, fixed_settings(config))) is not None:
        raise FedError(f"{str(directory)!r} was made with {changed}: {CONFIG} was changed since; put it back")
    rows = read_rows(directory)
    if not rows:
        raise FedError(f"{str(directory / ROUNDS)!r} holds no rows: the run ended before its first")
    return Run(config, rows, read_centralised(directory))


def read_config(directory: Path) -> RunConfig:
    """Return a run's configuration; raise FedError if the directory is not that of a run."""
    for name in (CONFIG, ROUNDS):
        if not (directory / name).is_file():
            raise FedError(f"{str(directory)!r} is not a run's directory: there is no {name} in it")
    return configuration.load_saved(directory / CONFIG)


def read_rows(directory: Path) -> list[Row]:
    """Return the rows, without an incomplete last line; an empty list if the file does not exist.

    Raises FedError unless they are those of rounds 0, 1, 2, … and fit the seals of the run's end and checkpoints.
    """
    seals = [*checkpoint.row_seals(directory), row_seal(directory)]  # before the rows, which a run may be adding to
    for seal in seals:
        if seal is not None:
            sealed_lines(directory, seal)
    return parse_rows(directory, complete_lines(directory))


def read_centralised(directory: Path) -> list[CentralisedRow]:
    """Return the results of centralised LoRA, or an empty list if it was not run; raise FedError for damaged ones."""
    path = directory / CENTRALISED
    if not path.is_file():
        return []
    check_centralised(directory)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FedError(f"{str(path)!r} is damaged: {error}") from None
    if not isinstance(rows, list) or not all(map(_is_centralised, rows)):
        raise FedError(f"{str(path)!r} is damaged: it should hold a list of rows of steps and metrics")
    return cast("list[CentralisedRow]", rows)


def _is_centralised(row: Any) -> bool:
    if not isinstance(row, dict) or not {"steps", "accuracy"} <= row.keys():
        return False
    numbers = [value for value in row.values() if value is not None]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)


def write_centralised(directory: Path, rows: Sequence[CentralisedRow]) -> None:
    """Write the results of centralised LoRA to `centralised.json`, one object for each number of steps."""
    write_atomically(directory / CENTRALISED, json.dumps(list(rows), indent=2) + "\n")
    if (directory / FINISHED).is_file():
        mark_centralised(directory)
