"""The error that the command line reports to its user, errors of the machine, text safe to print, exit statuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Exit statuses of a command for unusable input (a FedError), after Ctrl-C, and if nobody reads its output any more.
BAD_INPUT, INTERRUPTED, UNREAD = 2, 130, 141

# Characters that command a terminal, reverse or break the line for a reader, or cannot be encoded.
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 1503  # characters of a message
_LINE_END = re.compile(r"\s*[\r\n]+\s*")


class FedError(ValueError):
    """An error in a configuration, data set or model; its message is one line that says what would be right.

    Names and values in the message may come from any file, so characters that are not for print are shown escaped, and
    a message that would fill the screen is shortened in the middle.
    """

    def __init__(self, message: object) -> None:
        line = printable(_LINE_END.sub(" ", str(message).strip()))
        half = (_LONGEST - 3) // 2
        super().__init__(line if len(line) <= _LONGEST else f"{line[:half]} … {line[-half:]}")


class StoppedError(FedError):
    """The end of a run that would end there again if it were only resumed; the message says what has to change."""


class UnreadError(KeyboardInterrupt):
    """Standard output is a pipe that was closed at its other end; a command then ends as after Ctrl-C."""


def printable(text: str, kept: str = "") -> str:
    r"""Return text with control characters, those that change its direction, and surrogates shown escaped.

    Characters in `kept`, such as line ends, stay.

    >>> print(printable("name\x1b[2J\n"))
    name\x1b[2J\n
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in kept else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


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
