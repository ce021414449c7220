"""Real processes of the command line, which can be stopped, killed and sent signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.support.command_line import Outcome

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A `python -m fed` process; as a context manager it is killed at the end, with all that it started."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.err")))
        self._out, self._err = folder / f"{number}.out", folder / f"{number}.err"
        hidden = ("FORCE_COLOR", "TTY_COMPATIBLE")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fed", *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal, not its children."""
        self._process.send_signal(number)

    def wait(self, seconds: float = 240) -> Outcome:
        """Wait for the end and return the outcome; the status of a killed process is negative."""
        status = self._process.wait(seconds)
        return Outcome(status, self._out.read_text(), self._err.read_text())

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def handles_signals(self) -> bool:
        """Whether the process has set a handler for SIGTERM, as the command line does when it begins."""
        return bool(_facts(self.pid).get("SigCgt", 0) >> (signal.SIGTERM - 1) & 1)

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Wait until the condition holds, and return whether it does; at the process's end it may not."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.running or time.monotonic() > end:
                return condition()
            time.sleep(0.005)
        return True

    def children(self) -> list[int]:
        """Return the processes that this one has started."""
        return [pid for pid in _processes() if _facts(pid).get("PPid") == self.pid]


def alive(pid: int) -> bool:
    """Return whether a process is there and not ended; one that is not waited for by anyone has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def parent(pid: int) -> int | None:
    """Return the process that a process came from; None if it has ended."""
    return _facts(pid).get("PPid")


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _facts(pid: int) -> dict[str, int]:
    """Return the parent and the mask of caught signals of a process; nothing if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {"PPid": int(fields["PPid"]), "SigCgt": int(fields.get("SigCgt", "0"), 16)}
