"""Output of runs and comparisons: progress bars on a terminal, plain lines elsewhere, and the results."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fed.errors import UnreadError, printable
from fed.experiments.plan import Cell
from fed.report import tables
from fed.report.comparison import Comparison
from fed.report.left_out import left_out_table
from fed.report.summary import COST, NOISE, OUTCOME
from fed.report.tables import percent, summary
from fed.simulation.run_directory import Run
from fed.types import Row

_SPEED_OVER_SECONDS = 1800.0  # time left is estimated from the last half hour, because methods differ in speed

_SAY_EVERY_SECONDS = 30.0

# A callback that is called with the number of steps done and a note on the last one.
Advance = Callable[[int, str], None]
ONGOING = -1  # in place of the number of steps done: it is as before


class _Output(Console):
    """A console that prints text as it is, and if nobody reads it any more, ends the command."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=stderr)

    def on_broken_pipe(self) -> None:
        """Discard what is still printed, and raise UnreadError unless it was for standard error."""
        self.quiet = True
        with suppress(OSError):  # a file that is not of the operating system
            discard = os.open(os.devnull, os.O_WRONLY)
            os.dup2(discard, self.file.fileno())
            os.close(discard)
        if not self.stderr:
            raise UnreadError


class Screen:
    """The output of one command, on standard output and, for warnings, standard error.

    Names in it may come from any file, so characters that are not for print are shown escaped.
    """

    def __init__(self) -> None:
        self._out = _Output()
        self._err = _Output(stderr=True)
        self.is_terminal = self._out.is_terminal

    def say(self, line: str) -> None:
        """Print one line, or several."""
        self._out.print(printable(line, kept="\n"))

    def warn(self, line: str) -> None:
        """Print one line on standard error."""
        self._err.print(printable(f"warning: {line}"))

    @contextmanager
    def stage(self, name: str, total: int, every: int = 1) -> Iterator[Advance]:
        """Show the progress of a stage of `total` steps: a bar, or without a terminal a line every `every` steps."""
        if self.is_terminal and total:
            note, left = _plain("{task.fields[note]}"), _plain("left")
            with self.bars(MofNCompleteColumn(), note, TimeRemainingColumn(compact=True), left) as bar:
                task = bar.add_task(printable(name), total=total, note="")
                yield lambda done, note: bar.update(
                    task, completed=None if done == ONGOING else done, note=printable(note)
                )
            return

        def advance(done: int, note: str) -> None:
            if done % every == 0 or done == total:
                self.say(f"{name} {done:>{len(str(total))}}/{total}  {note}")

        yield advance

    def inner_progress(self, advance: Advance) -> Callable[[str, int, int], None]:
        """Return a callback that shows what is done within a step of a stage: what, how much of it, of how much.

        On a terminal it is the note of the stage's bar, elsewhere a line every half minute.
        """
        said = time.monotonic()

        def show(what: str, done: int, total: int) -> None:
            nonlocal said
            if self.is_terminal:
                advance(ONGOING, f"{what} {done}/{total}")
            elif time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                self.say(f"  {what} {done}/{total}")

        return show

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """Show a stage whose duration is not known in advance."""
        if self.is_terminal:
            with self.bars(TimeElapsedColumn()) as bar:
                task = bar.add_task(printable(name), total=None)
                yield
                bar.update(task, total=1, completed=1)
        else:
            self.say(name)
            yield

    def bars(self, *columns: ProgressColumn, width: int = 16, **settings: Any) -> Progress:
        """Return progress bars with a name before and these columns behind them; what is said appears above them."""
        name, bar = _plain("{task.description}"), BarColumn(bar_width=width)
        return Progress(name, bar, *columns, console=self._out, **settings)

    def table(self, lines: Sequence[tuple[str, ...]]) -> None:
        """Print a table, heading first; columns that do not fit the terminal are printed as further tables."""
        for part in _fitting([tuple(map(printable, line)) for line in lines], self._out.width):
            heading, *rest = part
            table = Table(box=None, pad_edge=False)
            table.add_column(heading[0], no_wrap=True)
            for title in heading[1:]:
                table.add_column(title, justify="right", no_wrap=True)
            for line in rest:
                table.add_row(*line)
            self._out.print()
            self._out.print(table)

    def summarise(self, run: Run) -> None:
        """Print a run's accuracy before and after, its gain, and for comparison the gain of centralised LoRA.

        Updates that were left out or clipped follow, counted by reason.
        """
        config = run.config
        self.table(summary(run))
        if lines := left_out_table(run.rows):
            self.table(lines)
        if run.centralised:
            self.say(
                f"ratio: the federated gain over that of rank-{config.adapter.rank} LoRA trained on all clients'\n"
                "rows together, same optimiser, learning rate and batch size: in as many steps as\n"
                f"one client a round takes, and as the {config.clients.per_round} of every round take together"
            )

    def show(self, comparison: Comparison) -> None:
        """Print a comparison: accuracy, paired differences, noise, cost, verdicts and notes."""
        self.table(tables.table(comparison, OUTCOME))
        for lines in tables.paired_tables(comparison):
            self.table(lines)
        for names in (NOISE, COST):
            if comparison.metrics(names):
                self.table(tables.table(comparison, names))
        for sentences in (tables.verdicts(comparison), tables.notes(comparison)):
            self._out.print()
            for line in sentences:
                self.say(textwrap.fill(line, self._out.width, subsequent_indent="  "))


def _plain(text: str) -> TextColumn:
    return TextColumn(text, markup=False)


def _fitting(lines: Sequence[tuple[str, ...]], width: int) -> list[list[tuple[str, ...]]]:
    """Divide a table by columns into tables that fit `width`, each beginning with the first column."""
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    parts: list[list[int]] = []
    room = 0
    for number, needed in enumerate(widths[1:], start=1):
        if not parts or needed > room:
            parts.append([0])
            room = width + 2 - widths[0]
        parts[-1].append(number)
        room -= needed
    return [[tuple(line[number] for number in part) for line in lines] for part in parts]


def round_note(row: Row) -> str:
    """Return a short note on a round: accuracy, loss, the clients' training time, and for texts tokens a second."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
    speed, padding = row.get("tokens_per_second"), row.get("padding_share")
    tokens = "" if speed is None or padding is None else f"  {speed:.0f} tokens/s, {padding:.0%} padding"
    return f"accuracy {percent(row):>6}  loss {loss}  {row['train_seconds']:.1f} s{tokens}"


class ComparisonProgress:
    """A context manager that shows the progress of a comparison; `on_event` takes the events of its runs.

    `failures` holds a line for each run that failed. `told` are messages about the data that were shown before: runs
    share their data, so each message is shown once. A `quiet` one does not show what is said of updates that are left
    out or clipped, where attacks make many.
    """

    def __init__(
        self, screen: Screen, cells: list[Cell], already: int, told: Iterable[str] = (), quiet: bool = False
    ) -> None:
        self._quiet = quiet
        self.failures: list[str] = []
        self._told = set(told)
        self._screen = screen
        self._runs, self._ended = already + len(cells), already
        self._rounds = sum(cell.config.rounds for cell in cells)
        self._played: dict[str, int] = {}  # the last round of each run, by the run's label
        self._began = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._screen.is_terminal and self._rounds:
            columns = MofNCompleteColumn(), _plain("{task.fields[note]}"), TimeRemainingColumn(compact=True)
            self._bars = self._screen.bars(*columns, width=12, speed_estimate_period=_SPEED_OVER_SECONDS)
            self._bars.start()
            self._tasks["all"] = self._bars.add_task("all rounds", total=self._rounds, note=f"{self._count()} runs")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def on_event(self, cell: Cell, kind: str, payload: Any) -> None:
        """Show a round ("row"), a run's end ("finished" with its last row, "failed") or a message.

        Messages are "base", "event", and "data", which several runs may have to say.
        """
        if kind == "row":
            self._row(cell, payload)
        elif kind == "base":
            self._screen.say(payload)
        elif kind == "data":
            if payload not in self._told:
                self._told.add(payload)
                self._warn(f"{cell.label}: {payload}")
        elif kind == "event":
            if not self._quiet:
                self._warn(f"{cell.label}: {payload}")
        else:
            self._end(cell, payload, failed=kind == "failed")

    def _row(self, cell: Cell, row: Row) -> None:
        self._played[cell.label] = row["round"]
        if self._bars is None:
            return
        if cell.label not in self._tasks:
            self._tasks[cell.label] = self._bars.add_task(printable(cell.label), total=cell.config.rounds, note="")
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
        self._screen.say(f"run {self._count()}  {_reached(outcome)}  {cell.label}{self._time_left()}")

    def _count(self) -> str:
        return f"{self._ended:>{len(str(self._runs))}} of {self._runs}"

    def _time_left(self) -> str:
        """Return the estimated time left as text, or nothing if there is a progress bar, which shows it already."""
        played = sum(self._played.values())
        left = self._rounds - played
        if self._bars is not None or left <= 0 or not played:
            return ""
        return f"  ({duration((time.monotonic() - self._began) / played * left)} left)"

    def _warn(self, line: str) -> None:
        """Print a warning on standard error, or above the progress bars if there are any."""
        if self._bars is None:
            self._screen.warn(line)
        else:
            self._screen.say(f"warning: {line}")


def _reached(row: Row) -> str:
    return f"accuracy {percent(row):>6}"


def duration(seconds: float) -> str:
    """Return a time as text: in seconds below two minutes, in minutes below two hours, else in hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
