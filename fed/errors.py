"""The error that the command line reports to its user, errors of the machine in one line, and the exit statuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Exit statuses of a command for unusable input (a FedError), and after Ctrl-C.
BAD_INPUT, INTERRUPTED = 2, 130


class FedError(ValueError):
    """An error in a configuration, data set or model; its message is one line that says what would be right."""


# How torch's allocators say that there is no memory, and how Rust libraries say what the system refused.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_REFUSED = re.compile(r'Os \{ code: \d+, kind: \w+, message: "(.+?)" \}|I/O error: (.+?) \(os error \d+\)')


def machine_fault(error: BaseException) -> str | None:
    """Return in one line what the machine refused, such as memory or room on a disk; None for any other error.

    >>> machine_fault(OSError(28, "No space left on device", "runs/a/rounds.jsonl"))
    'runs/a/rounds.jsonl: No space left on device'
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return "there is not enough memory; smaller batches, cohorts or models would need less"
    fault, file = system_fault(error), getattr(error, "filename", None)
    return f"{file}: {fault}" if fault is not None and file else fault


@contextmanager
def machine_faults() -> Iterator[None]:
    """Within the context, raise errors of the machine (`machine_fault`) as FedErrors."""
    try:
        yield
    except FedError:
        raise
    except Exception as error:
        if (fault := machine_fault(error)) is None:
            raise
        raise FedError(fault) from error


def system_fault(error: BaseException) -> str | None:
    """Return what the system said of a file that it refused to read or write, or None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    refused = _REFUSED.search(str(error))
    return None if refused is None else refused[1] or refused[2]
