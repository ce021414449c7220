"""How the threads of OpenMP, by which torch divides its work on the CPU, wait for each other.

Threads of GNU's OpenMP keep their cores busy while they wait, for up to milliseconds. Where other work needs a core as
well, the thread that all wait for gets none for that long, and a step takes several times its time. Threads that sleep
while they wait avoid that, but waking them costs time on an idle machine: a tenth in an encoder of MiniLM's width, and
more in smaller models. So they sleep only where a machine is busy.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Each of these says how threads wait, to the OpenMP of GNU, Intel or LLVM; any of them is the user's choice.
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
_STAT = Path("/proc/stat")
_LOOK_SECONDS = 0.1  # ten of the kernel's ticks


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_passively_if_busy() -> None:
    """Let threads of this process and of those it starts sleep while they wait, if other programs use the machine.

    It looks for a tenth of a second how many cores are idle, on Linux; elsewhere it does nothing, nor where the user
    set a variable that says how to wait. OpenMP reads the setting when torch is imported; after that this does nothing
    either. Only programs call it: a library leaves the environment alone.
    """
    if "torch" not in sys.modules and not _has_chosen() and idle_cores() < available_cores() - 0.5:
        os.environ.update(_PASSIVE)


def idle_cores() -> float:
    """Return how many of the machine's cores were idle for the last tenth of a second; infinity if it is not known."""
    with suppress(OSError, ValueError, IndexError):
        idle, total = _ticks()
        time.sleep(_LOOK_SECONDS)
        idle_after, total_after = _ticks()
        if total_after > total:
            return (idle_after - idle) / (total_after - total) * (os.cpu_count() or 1)
    return float("inf")


def _ticks() -> tuple[int, int]:
    """Return the idle ticks and all ticks of all cores since the machine was started."""
    ticks = [int(field) for field in _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)  # waiting for a disk is idle too


@contextmanager
def passive_children(crowded: bool) -> Iterator[None]:
    """Within the context, let threads of processes started by this one sleep while they wait, if they are `crowded`.

    That is, if together they have more threads than there are cores. A choice of the user stays.
    """
    settings = _PASSIVE if crowded and not _has_chosen() else {}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]


def _has_chosen() -> bool:
    return any(name in os.environ for name in _CHOICES)
