"""Work done in processes of its own, several at once: to compile in parallel, and so that a crash or a kernel that
never ends costs one piece of work and not the run.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

# Until a new process has imported torch and opened the device.
STARTUP_SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """What became of one piece of work: its value, or why there is none."""

    value: Any = None
    error: str | None = None


def one_line(error: BaseException) -> str:
    """Return an exception as one short line: its type and the first line of its message."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def outcomes(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int,
    seconds_each: float,
    deadline: float = float("inf"),
    end: float = float("inf"),
) -> Iterator[tuple[int, Outcome]]:
    """Yield `(position, outcome)` of function(item) for every item, by a `Workers` of its own."""
    with Workers(function, min(workers, len(items)), seconds_each) as pool:
        yield from pool.outcomes(items, deadline, end)


def attempt(function: Callable[[Any], Any], item: Any) -> Outcome:
    """Return function(item), or its exception as one line."""
    try:
        return Outcome(function(item))
    except Exception as error:  # whatever a provider or a compiler raises is a finding, not an end
        return Outcome(error=one_line(error))


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Answer items until the pipe closes."""
    connection.send("ready")
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(attempt(function, item))


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    position: int | None = None
    since: float = 0.0
    ready: bool = False


class Workers:
    """Processes that answer function(item), kept from one list of items to the next; a context manager.

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
        for worker in self._workers:
            self._stop(worker)

    def outcomes(
        self, items: Sequence[Any], deadline: float = float("inf"), end: float = float("inf")
    ) -> Iterator[tuple[int, Outcome]]:
        """Yield `(position, outcome)` of every item, as they are finished.

        After `deadline`, a `time.monotonic()`, nothing new is begun, and at `end` processes are stopped with what they
        have begun; items left then are not yielded.
        """
        if self.size == 0:
            for position, item in enumerate(items):
                if time.monotonic() > deadline:
                    return
                yield position, attempt(self.function, item)
            return
        self._items, self._next, self._deadline, self._end = items, 0, min(deadline, end), end
        if items and not self._workers:
            self._workers = [self._start() for _ in range(self.size)]
        for worker in self._workers:
            if worker.ready:
                self._give(worker)
        while self._more() or any(worker.position is not None for worker in self._workers):
            if not self._workers:  # none of them ever came up
                return
            ready = wait([worker.connection for worker in self._workers], timeout=0.5)
            for worker in list(self._workers):
                yield from self._look_at(worker, worker.connection in ready)

    def _more(self) -> bool:
        return self._next < len(self._items) and time.monotonic() < self._deadline

    def _look_at(self, worker: _Worker, spoke: bool) -> Iterator[tuple[int, Outcome]]:
        """Take a worker's answer, or its death or silence for one, and give it the next item."""
        position = worker.position
        if spoke:
            try:
                answer = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join(5.0)
                answer = Outcome(error=f"its process ended with status {worker.process.exitcode}")
                self._replace(worker)
            else:
                worker.ready = True
                self._give(worker)
        elif time.monotonic() > self._end:
            self._workers.remove(worker)
            self._stop(worker)
            return
        elif self._overdue(worker):
            answer = Outcome(error=f"not done after {self.seconds_each:.0f} s; its process was stopped")
            self._replace(worker)
        else:
            return
        if position is not None:
            yield position, answer

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
        worker.position = None
        if not self._more():
            return
        worker.position, worker.since = self._next, time.monotonic()
        worker.connection.send(self._items[self._next])
        self._next += 1

    def _replace(self, worker: _Worker) -> None:
        """Stop a worker and start another; one that never came up is not tried again."""
        self._workers.remove(worker)
        self._stop(worker)
        if worker.ready:
            self._workers.append(self._start())

    def _stop(self, worker: _Worker) -> None:
        worker.connection.close()
        if worker.position is not None:
            worker.process.kill()
        worker.process.join(10.0)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
