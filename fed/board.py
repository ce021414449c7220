"""What a comparison shows while it runs: a line for every finished run, and on a terminal bars below them."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fed.grid import Cell
from fed.report import percent

_SPEED_OVER_SECONDS = 1800.0  # methods differ in speed: the time left stands on the last half hour


class Board:
    """A context that is told what happens to each run of a comparison.

    `failures` holds a line for each run that could not be played.
    """

    def __init__(self, cells: list[Cell], already: int) -> None:
        self.failures: list[str] = []
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(highlight=False, soft_wrap=True, stderr=True)
        self._runs, self._ended = already + len(cells), already
        self._rounds = sum(cell.config.rounds for cell in cells)
        self._played: dict[str, int] = {}  # each run's last round
        self._began = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._out.is_terminal and self._rounds:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=self._out,
                speed_estimate_period=_SPEED_OVER_SECONDS,
            )
            self._bars.start()
            self._tasks["all"] = self._bars.add_task("all rounds", total=self._rounds, note=f"{self._count()} runs")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def tell(self, cell: Cell, kind: str, payload: Any) -> None:
        """Show a round ("row"), a run's end ("finished" with its last row, "failed"), or a line ("base", "event")."""
        if kind == "row":
            self._row(cell, payload)
        elif kind == "base":
            self._say(payload)
        elif kind == "event":
            self._warn(f"{cell.label}: {payload}")
        else:
            self._end(cell, payload, failed=kind == "failed")

    def _row(self, cell: Cell, row: dict[str, Any]) -> None:
        self._played[cell.label] = row["round"]
        if self._bars is None:
            return
        if cell.label not in self._tasks:
            self._tasks[cell.label] = self._bars.add_task(cell.label, total=cell.config.rounds, note="")
        self._bars.update(self._tasks[cell.label], completed=row["round"], note=_reached(row))
        self._bars.update(self._tasks["all"], completed=sum(self._played.values()))

    def _end(self, cell: Cell, outcome: Any, failed: bool) -> None:
        if self._bars is not None and cell.label in self._tasks:
            self._bars.remove_task(self._tasks.pop(cell.label))
        if failed:
            self.failures.append(f"{cell.label}: {outcome}")
            self._warn(f"{cell.label} cannot be played: {outcome}")
            return
        self._ended += 1
        self._played[cell.label] = cell.config.rounds
        if self._bars is not None:
            self._bars.update(self._tasks["all"], note=f"{self._count()} runs")
        self._say(f"run {self._count()}  {_reached(outcome)}  {cell.label}{self._time_left()}")

    def _count(self) -> str:
        return f"{self._ended:>{len(str(self._runs))}} of {self._runs}"

    def _time_left(self) -> str:
        """The time the remaining rounds take at the speed so far; a bar on a terminal says it already."""
        played = sum(self._played.values())
        left = self._rounds - played
        if self._bars is not None or left <= 0 or not played:
            return ""
        return f"  ({duration((time.monotonic() - self._began) / played * left)} left)"

    def _say(self, line: str) -> None:
        (self._bars.console if self._bars else self._out).print(line, markup=False)

    def _warn(self, line: str) -> None:
        (self._bars.console if self._bars else self._err).print(f"warning: {line}", markup=False)


def _reached(row: dict[str, Any]) -> str:
    return f"accuracy {percent(row):>6}"


def duration(seconds: float) -> str:
    """Return a time in words: seconds below two minutes, minutes below two hours, hours beyond."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
