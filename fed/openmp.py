"""How the threads of OpenMP, by which torch divides its work on the CPU, wait for that work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Each of these says how threads wait, to the OpenMP of GNU, Intel or LLVM; any of them is the user's choice.
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


def wait_passively() -> None:
    """Let threads of this process and of those it starts sleep while they wait, unless the user chose otherwise.

    Threads of GNU's OpenMP keep their cores busy while they wait for each other. Where another program needs a core as
    well, the thread that all wait for gets none, and operations take ten times as long. OpenMP reads the setting when
    torch is imported; once it is, this does nothing. Only programs call it: a library leaves the environment alone.
    """
    if "torch" not in sys.modules:
        os.environ.update(_settings())


@contextmanager
def passive_children() -> Iterator[None]:
    """Within the context, let threads of processes started by this one sleep while they wait, as `wait_passively`."""
    settings = _settings()
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]


def _settings() -> dict[str, str]:
    return {} if any(name in os.environ for name in _CHOICES) else _PASSIVE
