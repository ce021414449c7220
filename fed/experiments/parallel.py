"""Playing several runs of a comparison at once, in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fed.experiments.plan import Cell
from fed.experiments.runner import OnEvent, SharedInputs, in_turn
from fed.openmp import available_cores, passive_children


def at_once(cells: Sequence[Cell], jobs: int, directory: Path, tell: OnEvent) -> None:
    """Play runs in `jobs` processes; a process that has finished a run gets the next one.

    `tell` is called in this process with all events of the workers. If a worker dies, only its current run fails. An
    exception in this process, such as Ctrl-C, terminates the workers; their unfinished runs stay on disk.
    """
    waiting = list(reversed(cells))
    count, cores = min(jobs, len(cells)), available_cores()
    crowded = count * max(cell.config.threads or cores for cell in cells) > cores
    workers = [_Worker(directory, crowded) for _ in range(count)]
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
    """A process that plays one cell at a time; `crowded` if all of them have more threads than there are cores."""

    def __init__(self, directory: Path, crowded: bool) -> None:
        # Not forked, because a forked child would inherit this process's CUDA context and the locks of its threads.
        self._context = multiprocessing.get_context("spawn")
        self._directory, self._crowded = directory, crowded
        self.cell: Cell | None = None
        self.pipe: Connection
        self._process: BaseProcess
        self._begin()

    def _begin(self) -> None:
        self.pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self._directory), daemon=True)
        with passive_children(self._crowded):
            self._process.start()
        theirs.close()

    def give(self, cell: Cell) -> None:
        """Send a cell to the process, which is started again if it has died."""
        if not self._process.is_alive():
            self._begin()
        self.cell = cell
        self.pipe.send(cell)

    def hear(self, tell: OnEvent) -> bool:
        """Receive one message and pass it to `tell`; return whether the worker is idle now."""
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
        """Terminate the process, even while it plays a run."""
        self._process.terminate()
        self._process.join()
        self.pipe.close()


def _serve(pipe: Connection, directory: Path) -> None:
    """Play the cells that come through the pipe, until the parent process terminates this one or has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent process terminates the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    bench = SharedInputs(directory)

    def tell(cell: Cell, kind: str, payload: Any) -> None:
        pipe.send((kind, payload))

    with suppress(EOFError, BrokenPipeError):  # raised when the parent process has ended
        while True:
            in_turn([pipe.recv()], bench, tell)


def _end_with_parent() -> None:
    """Wait for the end of the parent process, which may be killed, and end this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # because this process was started by one
    parent.join()
    os._exit(1)
