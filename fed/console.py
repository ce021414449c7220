"""What a run shows at the terminal: a bar where there is one, plain lines where there is none, and the summary."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fed import wording
from fed.comparison import Comparison
from fed.metrics import COST, NOISE, OUTCOME
from fed.report import Run, percent, summary

# Called with the steps done and a note on how it goes.
Advance = Callable[[int, str], None]

_LINES_PER_STAGE = 10


class Screen:
    """The terminal of one run. `terminal` says whether there is one to draw bars on."""

    def __init__(self) -> None:
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(highlight=False, soft_wrap=True, stderr=True)

    def say(self, line: str) -> None:
        """Print one line."""
        self._out.print(line, markup=False)

    def warn(self, line: str) -> None:
        """Print one line on standard error."""
        self._err.print(f"warning: {line}", markup=False)

    @contextmanager
    def stage(self, name: str, total: int, every: int = 1) -> Iterator[Advance]:
        """Show a stage of `total` steps: a bar, or without a terminal a line for every `every`-th step."""
        if self._out.is_terminal:
            note, left = TextColumn("{task.fields[note]}"), TextColumn("left")
            if total == 0:
                yield lambda done, note: None
                return
            with self._bar(MofNCompleteColumn(), note, TimeRemainingColumn(compact=True), left) as bar:
                task = bar.add_task(name, total=total, note="")
                yield lambda done, note: bar.update(task, completed=done, note=note)
            return

        def advance(done: int, note: str) -> None:
            if done % every == 0 or done == total:
                self.say(f"{name} {done:>{len(str(total))}}/{total}  {note}")

        yield advance

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """Show a stage whose end cannot be foretold."""
        if self._out.is_terminal:
            with self._bar(TimeElapsedColumn()) as bar:
                task = bar.add_task(name, total=None)
                yield
                bar.update(task, total=1, completed=1)
        else:
            self.say(name)
            yield

    def _bar(self, *columns: ProgressColumn) -> Progress:
        name, bar = TextColumn("{task.description}"), BarColumn(bar_width=16)
        return Progress(name, bar, *columns, console=self._out)

    def table(self, lines: Sequence[tuple[str, ...]]) -> None:
        """Print a table, its heading first; columns that do not fit the terminal follow in further tables."""
        for part in _fitting(lines, self._out.width):
            (heading, *rest) = part
            table = Table(box=None, pad_edge=False)
            table.add_column(heading[0], no_wrap=True)
            for title in heading[1:]:
                table.add_column(title, justify="right", no_wrap=True)
            for line in rest:
                table.add_row(*line)
            self._out.print()
            self._out.print(table)

    def summarise(self, run: Run) -> None:
        """Print accuracy before and after with the gain, and beside it what centralised LoRA gains."""
        config = run.config
        self.table(summary(run))
        if run.centralised:
            self.say(
                f"ratio: the federated gain over that of rank-{config.adapter.rank} LoRA trained on all clients'\n"
                "rows together, same optimiser, learning rate and batch size: in as many steps as\n"
                f"one client a round takes, and as the {config.clients.per_round} of every round take together"
            )

    def show(self, comparison: Comparison) -> None:
        """Print a comparison: accuracy, differences and their verdicts, noise, cost."""
        self.table(wording.table(comparison, OUTCOME))
        for lines in wording.paired_tables(comparison):
            self.table(lines)
        for names in (NOISE, COST):
            if comparison.metrics(names):
                self.table(wording.table(comparison, names))
        for sentences in (wording.verdicts(comparison), wording.notes(comparison)):
            self._out.print()
            for line in sentences:
                self.say(textwrap.fill(line, self._out.width, subsequent_indent="  "))


def _fitting(lines: Sequence[tuple[str, ...]], width: int) -> list[list[tuple[str, ...]]]:
    """Cut a table into tables that fit `width`, each beginning with the first column."""
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


def round_note(row: dict[str, Any]) -> str:
    """Say in a few words how a round went: accuracy, loss and the clients' training time."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
    return f"accuracy {percent(row):>6}  loss {loss}  {row['train_seconds']:.1f} s"
