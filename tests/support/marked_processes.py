"""Processes that are found and ended with all that they start, even what leaves their session, however a test ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.processes import alive, parent

# Every descendant inherits this variable; its value tells whose it is.
MARK = "PLORA_TESTS_PROCESSES"

# Becomes the command, which the kernel then kills when the test process dies (Linux's PR_SET_PDEATHSIG is 1).
LAUNCH = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})
if os.getppid() != int(sys.argv[1]):
    sys.exit("the test process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class MarkedProcess:
    """A running command whose standard output and error go to one file."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.name, self.log = name, log
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-IS", "-c", LAUNCH, str(os.getpid()), *command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def text(self) -> str:
        """Return all that the command and its children have written so far."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 25, hidden: Sequence[str] = ()) -> str:
        """Return the end of the log, under the command's name, without lines that contain one of `hidden`."""
        shown = [line for line in self.text().splitlines() if not any(text in line for text in hidden)]
        end = "\n".join(shown[-lines:])
        return f"--- {self.name} (exit status {self.status}), {self.log} ---\n{end}\n"

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command alone; one that has ended gets none."""
        if self.status is None:
            self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Wait for the end and return the exit status. Raises AssertionError with the log's end if it takes longer."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {seconds} s\n{self.tail()}") from None


class MarkedProcesses:
    """What starts marked processes; as a context manager it ends them and all their descendants."""

    def __init__(self) -> None:
        self._token = uuid.uuid4().hex
        self.started: list[MarkedProcess] = []

    def __enter__(self) -> MarkedProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        self.end_all()

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return the variables with the mark among them."""
        return {**environment, MARK: self._token}

    def start(
        self, name: str, command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]
    ) -> MarkedProcess:
        """Start a command; `command[0]` is an absolute path."""
        process = MarkedProcess(name, command, log, folder, self.environment(environment))
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Return the processes with the mark that have not ended."""
        mark = f"{MARK}={self._token}".encode()
        found = []
        for path in Path("/proc").iterdir():
            # A process may end, or belong to somebody else.
            with suppress(OSError):
                if path.name.isdigit() and mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return [pid for pid in found if alive(pid)]

    def family(self, pid: int) -> list[int]:
        """Return the marked processes that come from process `pid`, directly or through others; not `pid` itself."""
        parents = {child: parent(child) for child in self.pids()}
        found: list[int] = []
        level = {pid}
        while level := {child for child, above in parents.items() if above in level}:
            found += level
        return found

    def end_all(self, seconds: float = 10) -> None:
        """Kill all processes with the mark, and those that they start meanwhile."""
        end = time.monotonic() + seconds
        while pids := self.pids():
            assert time.monotonic() < end, f"processes {pids} cannot be killed"
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for process in self.started:
            process.wait(seconds)
