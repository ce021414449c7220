"""Runs of a comparison played several at once, each worker a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fed.experiments.plan import Cell
from fed.experiments.runner import OnEvent, SharedInputs, in_turn


def at_once(cells: Sequence[Cell], jobs: int, directory: Path, tell: OnEvent) -> None:
    """Play runs in `jobs` processes, handing out the next as soon as one is done.

    What the workers tell comes to `tell` in this process. A worker that dies fails its run alone. An exception
    here, Ctrl-C among them, ends the workers; what they were at stays as far as it got.
    """
    waiting = list(reversed(cells))
    workers = [_Worker(directory) for _ in range(min(jobs, len(cells)))]
    try:
        for worker in workers:
            worker.give(waiting.pop())
        while busy := {worker.pipe: worker for worker in workers if worker.cell is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                if worker.hear(tell) and waiting:
                    worker.give(waiting.pop())
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that plays the cells it is given, one at a time."""

    def __init__(self, directory: Path) -> None:
        # A forked child would share this process's CUDA context and threads' locks.
        self._context = multiprocessing.get_context("spawn")
        self._directory = directory
        self.cell: Cell | None = None
        self.pipe: Connection
        self._process: BaseProcess
        self._begin()

    def _begin(self) -> None:
        self.pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self._directory), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, cell: Cell) -> None:
        """Let the process play this cell."""
        if not self._process.is_alive():
            self._begin()
        self.cell = cell
        self.pipe.send(cell)

    def hear(self, tell: OnEvent) -> bool:
        """Pass on one message; return whether the worker is free again."""
        if self.cell is None:
            return True
        try:
            kind, payload = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            kind, payload = "failed", f"its process ended with status {self._process.exitcode}"
        tell(self.cell, kind, payload)
        if kind in ("finished", "failed"):
            self.cell = None
        return self.cell is None

    def end(self) -> None:
        """End the process, whatever it is at."""
        self._process.terminate()
        self._process.join()
        self.pipe.close()


def _serve(pipe: Connection, directory: Path) -> None:
    """Play what comes through the pipe until the parent ends this process or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    bench = SharedInputs(directory)

    def tell(cell: Cell, kind: str, payload: Any) -> None:
        pipe.send((kind, payload))

    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            in_turn([pipe.recv()], bench, tell)
