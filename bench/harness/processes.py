"""Work in other processes, several at once: to compile in parallel, and so that a crash or a kernel that never ends
costs one piece of work, not the run.

A piece of work may `note` results on its way, which are kept if its process dies.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NoReturn

# How long a new process may take to import torch and open the device.
STARTUP_SECONDS = 120.0
# Seconds that stopping processes may take, all of them together.
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of one piece of work: its value, or the error; and its notes.

    It is `cut` if the time of the whole run was up before it was done, which is not its fault. If it is `lost`, its
    process cannot be used any more.
    """

    value: Any = None
    error: str | None = None
    notes: tuple[Any, ...] = ()
    cut: bool = False
    lost: bool = False

    @property
    def last_note(self) -> Any:
        """Return the last note, or None without notes."""
        return self.notes[-1] if self.notes else None


class LostProcessError(Exception):
    """Raised by work after which its process cannot be used, for example because its device failed; it is replaced."""


@dataclass(frozen=True)
class _Note:
    value: Any


_listener: Callable[[Any], None] | None = None


def note(value: object) -> None:
    """Add a note to this piece of work's `Outcome.notes`, which is kept even if the work never ends."""
    if _listener is not None:
        _listener(value)


def one_line(error: BaseException) -> str:
    """Return an exception as one short line: its type and the first line of its message."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def require_device(device_type: str, error: Exception) -> None:
    """Raise LostProcessError if the device no longer works in this process, so that all after `error` would fail.

    After an illegal memory access, for example, every later CUDA call of the process fails.
    """
    if device_type != "cuda":
        return
    import torch  # here, because processes without a device start faster without it

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception as broken:
        raise LostProcessError(f"{one_line(error)}; its process could not go on") from broken


def outcomes(
    function: Callable[[Any], Any], items: Sequence[Any], *, workers: int, seconds_each: float
) -> Iterator[tuple[int, Outcome]]:
    """Yield `(position, outcome)` of function(item) for every item, by a `Workers` of its own."""
    with Workers(function, min(workers, len(items)), seconds_each) as pool:
        yield from pool.outcomes(items)


def leave(status: int) -> NoReturn:
    """End this process at once, without waiting for a driver or for child processes that cannot be stopped."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def end_on_termination() -> None:
    """Make SIGTERM raise an exception in this process, so that its child processes are stopped too."""

    def leave_blocks(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave_blocks)


def _listened(function: Callable[[Any], Any], item: Any, listener: Callable[[Any], None]) -> Outcome:
    """Return function(item), or its exception as one line; notes go to the listener."""
    global _listener
    before, _listener = _listener, listener
    try:
        return Outcome(function(item))
    except LostProcessError as error:
        return Outcome(error=str(error), lost=True)
    except Exception as error:  # any error of a provider or a compiler is a result
        return Outcome(error=one_line(error))
    finally:
        _listener = before


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Process items until the pipe closes."""
    _end_with_parent()

    def send_note(value: object) -> None:
        connection.send(_Note(value))

    connection.send("ready")
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        outcome = _listened(function, item, send_note)
        connection.send(outcome)
        if outcome.lost:
            leave(1)


def _end_with_parent() -> None:
    """Ask the operating system to kill this process when its parent ends for any reason; does nothing outside Linux."""
    with suppress(OSError, AttributeError):
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    position: int | None = None
    since: float = 0.0
    ready: bool = False
    notes: list[Any] = field(default_factory=list)


class Workers:
    """Processes that compute function(item), reused for several lists of items; a context manager.

    Args:
        function: a module's function; items and values are picklable. With `size=0` it runs in this process.
        seconds_each: an item that takes longer is stopped with its process, and a new one takes its place.
    """

    def __init__(self, function: Callable[[Any], Any], size: int, seconds_each: float) -> None:
        self.function, self.size, self.seconds_each = function, size, seconds_each
        self._workers: list[_Worker] = []
        self._items: Sequence[Any] = ()
        self._next = 0
        self._deadline = self._end = float("inf")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop(self._workers)
        self._workers = []

    def start(self) -> None:
        """Start the processes now, so that they are ready when items come."""
        self._workers += [self._start() for _ in range(self.size - len(self._workers))]

    def await_ready(self, seconds: float) -> None:
        """Start the processes and wait until all are ready, for `seconds` at most."""
        self.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not all(worker.ready for worker in self._workers):
            spoke = wait([worker.connection for worker in self._workers], timeout=0.2)
            for worker in list(self._workers):
                if worker.connection in spoke:
                    self._hear(worker)

    def outcomes(
        self, items: Sequence[Any], deadline: float = float("inf"), end: float = float("inf")
    ) -> Iterator[tuple[int, Outcome]]:
        """Yield `(position, outcome)` of every item as it finishes; the list may grow meanwhile.

        After `deadline`, a `time.monotonic()`, no item is started, and at `end` processes are stopped with the items
        that they work on. Of the items left then only those with notes are yielded, as `cut`. Without workers nothing
        can be stopped.
        """
        if self.size == 0:
            for position, item in enumerate(items):
                if time.monotonic() > min(deadline, end):
                    return
                notes: list[Any] = []
                outcome = _listened(self.function, item, notes.append)
                yield position, replace(outcome, notes=tuple(notes))
            return
        self._items, self._next, self._deadline, self._end = items, 0, min(deadline, end), end
        if items:
            self.start()
        while True:
            for worker in list(self._workers):
                if worker.ready and worker.position is None and self._more():
                    self._give(worker)
            if not self._workers:  # none of them ever became ready
                return
            if not self._more() and all(worker.position is None for worker in self._workers):
                return
            ready = wait([worker.connection for worker in self._workers], timeout=0.2)
            for worker in list(self._workers):
                yield from self._look_at(worker, worker.connection in ready)

    def _more(self) -> bool:
        return self._next < len(self._items) and time.monotonic() < self._deadline

    def _look_at(self, worker: _Worker, spoke: bool) -> Iterator[tuple[int, Outcome]]:
        """Yield the outcome of a worker's item if it sent one, ended, or took too long."""
        position, cut = worker.position, False
        answer = self._hear(worker) if spoke else None
        if answer is None:
            if time.monotonic() > self._end and (position is not None or not worker.ready):
                answer = Outcome(error="the time was up")
                cut = True
            elif self._overdue(worker):
                answer = Outcome(error=f"not done after {self.seconds_each:.0f} s; its process was stopped")
            else:
                return
            self._replace(worker, again=not cut)
        worker.position = None
        if position is not None and (worker.notes or not cut):
            yield position, replace(answer, notes=tuple(worker.notes), cut=cut)

    def _hear(self, worker: _Worker) -> Outcome | None:
        """Read all that a worker sent; return its item's outcome if that has come."""
        try:
            while worker.connection.poll():
                told = worker.connection.recv()
                worker.ready = True
                if isinstance(told, _Note):
                    worker.notes.append(told.value)
                elif isinstance(told, Outcome):
                    if told.lost:
                        self._replace(worker)
                    return told
        except (EOFError, OSError):
            worker.process.join(STOP_SECONDS)
            status = worker.process.exitcode
            self._replace(worker)
            return Outcome(error=f"its process ended with status {status}")
        return None

    def _overdue(self, worker: _Worker) -> bool:
        waited = time.monotonic() - worker.since
        if not worker.ready:
            return waited > STARTUP_SECONDS
        return worker.position is not None and waited > self.seconds_each

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.function), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, since=time.monotonic())

    def _give(self, worker: _Worker) -> None:
        try:
            worker.connection.send(self._items[self._next])
        except OSError:  # it ended while it was idle
            self._replace(worker)
            return
        worker.position, worker.since, worker.notes = self._next, time.monotonic(), []
        self._next += 1

    def _replace(self, worker: _Worker, *, again: bool = True) -> None:
        """Stop a worker and start another; one that never became ready is not started again."""
        self._workers.remove(worker)
        self._stop([worker])
        if worker.ready and again:
            self._workers.append(self._start())

    def _stop(self, workers: Sequence[_Worker]) -> None:
        """Kill processes; one that hangs in its driver is waited for no longer than `STOP_SECONDS`."""
        for worker in workers:
            worker.process.kill()
            worker.connection.close()
        end = time.monotonic() + STOP_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, end - time.monotonic()))
