"""A run's directory: never half-written, never in the place of something that is no run, and read back."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from fed import config as configuration
from fed.errors import FedError
from fed.files import write_atomically
from fed.types import CentralisedRow, Metrics, Row

if TYPE_CHECKING:
    from fed.config import RunConfig

CENTRALISED = "centralised.json"

CONFIG, ROUNDS, BASE, ADAPTER = "config.toml", "rounds.jsonl", "base", "adapter"


def looks_like_run(directory: Path) -> bool:
    """Return whether a directory holds what every run holds: its configuration and its rounds."""
    return (directory / CONFIG).is_file() and (directory / ROUNDS).is_file()


def require_free(target: Path, overwrite: bool) -> None:
    """Raise FedError unless `target` is free, or `overwrite` is set and it is empty or a run's directory."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FedError(f"--out is {str(target)!r}, which is not a directory; give another name")
    if target.resolve() in (here := Path.cwd().resolve(), *here.parents):
        raise FedError(f"--out is {str(target)!r}, which holds the working directory; give another name")
    if not target.exists():
        return
    if not overwrite:
        raise FedError(f"--out is {str(target)!r}, which exists; --overwrite replaces it, or give another name")
    if any(target.iterdir()) and not looks_like_run(target):
        raise FedError(
            f"--out is {str(target)!r}, which --overwrite leaves alone: it holds no {CONFIG} and {ROUNDS}, "
            "so it is not a run's directory"
        )


class RunDirectory:
    """A context in which a run's directory comes to be.

    What is written to `path` first lies under a temporary name beside `target`. `place` moves it to `target`, and
    what was there aside. Leaving the context without a call of `keep` puts everything back as it was, so nothing
    is left of a run that did not get through its first row; `keep` makes the change final.
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
        """Move what was written so far to `target`; from here on `path` is `target`."""
        if self.target.exists():
            self._aside = self._temporary()
            self.target.rename(self._aside / self.target.name)
        self.path.rename(self.target)
        self.path = self.target

    def commit(self) -> None:
        """Make the run's directory final: what it replaces is deleted now."""
        self.kept = True
        if self._aside is not None:
            shutil.rmtree(self._aside)
            self._aside = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
    """A run's directory, read: its configuration, its rows (row 0 first), and what centralised LoRA reached.

    `centralised` holds rows of steps, accuracy (0 … 1), loss and train_seconds; it is empty where it was left out.
    """

    config: RunConfig
    rows: list[Row]
    centralised: list[CentralisedRow]

    @property
    def gain_points(self) -> float:
        """Accuracy of the last round less that of the unadapted model, in percentage points."""
        return self.gain_of(self.rows[-1])

    def gain_of(self, row: Metrics) -> float:
        """Accuracy of `row` less that of the unadapted model, in percentage points."""
        return 100 * float(row["accuracy"] - self.rows[0]["accuracy"])


def read(directory: Path) -> Run:
    """Read a run's files; a last line cut off in mid-writing is left out. Raises FedError where there is no run."""
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
    """Return the rows of a run's file, without a last line cut off in mid-writing; none where there is no file."""
    try:
        *lines, _ = (directory / ROUNDS).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    return [parse_row(line) for line in lines]


def parse_row(line: str) -> Row:
    """Return a line of a run's file, perhaps of an earlier version, as a row."""
    return cast("Row", configuration.renamed(json.loads(line)))


def write_centralised(directory: Path, rows: Sequence[CentralisedRow]) -> None:
    """Write what centralised LoRA reached, one object for each number of steps, beside the run's rounds."""
    write_atomically(directory / CENTRALISED, json.dumps(list(rows), indent=2) + "\n")
