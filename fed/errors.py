"""The error that the command line reports to its user, errors of the machine in one line, and the exit statuses."""

from __future__ import annotations

import re

# Exit statuses of a command for unusable input (a FedError), and after Ctrl-C.
BAD_INPUT, INTERRUPTED = 2, 130


class FedError(ValueError):
    """An error in a configuration, data set or model; its message is one line that says what would be right."""


# How torch's allocators say that there is no memory, and how Rust libraries say what the system refused.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_REFUSED = re.compile(r'Os \{ code: \d+, kind: \w+, message: "([^"]+)" \}')


def machine_fault(error: BaseException) -> str | None:
    """Return in one line what the machine refused, such as memory or room on a disk; None for any other error.

    >>> machine_fault(OSError(28, "No space left on device", "runs/a/rounds.jsonl"))
    'runs/a/rounds.jsonl: No space left on device'
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if refused := _REFUSED.search(str(error)):
        return refused[1]
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return "there is not enough memory; smaller batches, cohorts or models would need less"
    return None
