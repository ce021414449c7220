"""Calls of the command line in forked children, which may be killed or sent a signal at any change of their files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.support.children import Tell, in_child
from tests.support.command_line import Outcome
from tests.support.file_events import FileEvent, watch

# Digits on an embedded model that has hardly been trained: a run of a second.
TINY = (
    *("rounds=2", "model.pretrain_steps=1", "clients.count=4", "clients.per_round=2", "clients.ranks=[2,4]"),
    *("train.local_steps=1", "data.train_rows=60", "data.test_rows=20", "adapter.target_modules=['q_proj']"),
)


def command(*arguments: str, root: Path | None = None, before: Callable[[FileEvent], object] | None = None) -> Outcome:
    """Call `python -m fed` in a child; `before` is called before each change of files below `root`.

    The status of a child that was killed is that of its process, and its output is lost.
    """

    def work(tell: Tell) -> tuple[int, str, str]:
        if root is not None and before is not None:
            watch(root, before)
        outcome = command_here(*arguments)
        return outcome.status, outcome.out, outcome.err

    ending = in_child(work)
    return Outcome(*ending.value) if ending.value is not None else Outcome(ending.status, "", "")


def command_here(*arguments: str) -> Outcome:
    """Call `python -m fed` in this process: after one call its children need not import everything again."""
    from fed.cli import main

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as end:
        main(list(arguments))
    return Outcome(end.value.code or 0, out.getvalue(), err.getvalue())


def command_events(root: Path, *arguments: str) -> list[FileEvent]:
    """Return the changes below `root` of a call that must succeed."""
    reader, writer = os.pipe()
    outcome = command(*arguments, root=root, before=lambda event: os.write(writer, f"{event.kind}\n".encode()))
    os.close(writer)
    with os.fdopen(reader) as file:
        kinds = file.read().splitlines()
    assert outcome.status == 0, outcome.err
    return [FileEvent(number, kind, ()) for number, kind in enumerate(kinds, 1)]
