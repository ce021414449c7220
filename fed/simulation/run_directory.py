"""The directory of a run: created as a whole, replacing nothing but an earlier run, and read back into a `Run`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

from fed import config as configuration
from fed.config import RunConfig
from fed.errors import FedError
from fed.files import write_atomically
from fed.types import CentralisedRow, Metrics, Row

CONFIG, ROUNDS, BASE, ADAPTER = "config.toml", "rounds.jsonl", "base", "adapter"
CENTRALISED = "centralised.json"


def require_free(target: Path, overwrite: bool) -> None:
    """Raise FedError unless `target` does not exist, or `overwrite` is set and it is empty or a run's directory."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FedError(f"--out is {str(target)!r}, which is not a directory; give another name")
    if target.resolve() in (here := Path.cwd().resolve(), *here.parents):
        raise FedError(f"--out is {str(target)!r}, which holds the working directory; give another name")
    if not target.exists():
        return
    if not overwrite:
        raise FedError(f"--out is {str(target)!r}, which exists; --overwrite replaces it, or give another name")
    holds_run = (target / CONFIG).is_file() and (target / ROUNDS).is_file()  # the two files that every run has
    if any(target.iterdir()) and not holds_run:
        raise FedError(
            f"--out is {str(target)!r}, which --overwrite leaves alone: it holds no {CONFIG} and {ROUNDS}, "
            "so it is not a run's directory"
        )


class RunDirectory:
    """A context manager that creates a run's directory, and removes it again unless the run gets under way.

    `path` is the directory to write to, at first a temporary one beside `target`. `publish` moves it to `target` and an
    earlier run at `target` aside. `commit` makes this final and deletes the earlier run. If the context is left
    without `commit`, the new directory is deleted and the earlier run is put back.
    """

    def __init__(self, target: Path, overwrite: bool) -> None:
        require_free(target, overwrite)
        self.target = target
        self.path = target
        self._made: list[Path] = []
        self._aside: Path | None = None
        self.kept = False

    def __enter__(self) -> Self:
        missing = [parent for parent in self.target.parents if not parent.exists()]
        try:
            for parent in reversed(missing):
                parent.mkdir()
                self._made.append(parent)
            self.path = self._temporary()
        except OSError as error:
            self._remove_parents()
            raise FedError(f"--out is {str(self.target)!r}: it cannot be written: {error.strerror}") from None
        return self

    def publish(self) -> None:
        """Move the directory to `target`, which `path` is from now on."""
        if self.target.exists():
            self._aside = self._temporary()
            self.target.rename(self._aside / self.target.name)
        self.path.rename(self.target)
        self.path = self.target

    def commit(self) -> None:
        """Make the run's directory final and delete the one that it replaces."""
        self.kept = True
        if self._aside is not None:
            shutil.rmtree(self._aside)
            self._aside = None

    def __exit__(self, *error: object) -> None:
        if self.kept:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if self._aside is not None:
            (self._aside / self.target.name).rename(self.target)
            self._aside.rmdir()
        self._remove_parents()

    def _temporary(self) -> Path:
        directory = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".tmp", dir=self.target.parent))
        directory.chmod(0o755)
        return directory

    def _remove_parents(self) -> None:
        for parent in reversed(self._made):
            parent.rmdir()


@dataclass(frozen=True)
class Run:
    """The contents of a run's directory: its configuration, its rows (row 0 first) and the centralised LoRA results.

    `centralised` holds rows of steps, accuracy (0 … 1), loss and train_seconds, or is empty if that was not run.
    """

    config: RunConfig
    rows: list[Row]
    centralised: list[CentralisedRow]

    def gain_of(self, row: Metrics) -> float:
        """Return the accuracy of `row` minus that of the unadapted model, in percentage points."""
        return 100 * float(row["accuracy"] - self.rows[0]["accuracy"])


def read(directory: Path) -> Run:
    """Read a run's files, without an incomplete last row; raise FedError if the directory is not that of a run."""
    for name in (CONFIG, ROUNDS):
        if not (directory / name).is_file():
            raise FedError(f"{str(directory)!r} is not a run's directory: there is no {name} in it")
    rows = read_rows(directory)
    if not rows:
        raise FedError(f"{str(directory / ROUNDS)!r} holds no rows: the run ended before its first")
    path = directory / CENTRALISED
    centralised = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return Run(configuration.load_saved(directory / CONFIG), rows, centralised)


def read_rows(directory: Path) -> list[Row]:
    """Return the rows of `rounds.jsonl`, without an incomplete last line; an empty list if the file does not exist."""
    try:
        *lines, _ = (directory / ROUNDS).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    return [parse_row(line) for line in lines]


def parse_row(line: str) -> Row:
    """Return a line of `rounds.jsonl` as a row; keys that earlier versions named otherwise are renamed."""
    return cast("Row", configuration.renamed(json.loads(line)))


def write_centralised(directory: Path, rows: Sequence[CentralisedRow]) -> None:
    """Write the results of centralised LoRA to `centralised.json`, one object for each number of steps."""
    write_atomically(directory / CENTRALISED, json.dumps(list(rows), indent=2) + "\n")
