"""What input of any kind may lead to: a result or a FedError of one line, at once."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fed.errors import FedError

HANGS_AFTER = 10.0  # seconds; an input takes some milliseconds
_NOT_FOR_PRINT = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@contextmanager
def watched(seconds: float = HANGS_AFTER) -> Iterator[None]:
    """Fail a test in which something hangs."""

    def fail(*_: object) -> None:
        raise TimeoutError(f"an input takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(make: Callable[[], Any]) -> tuple[Any, str]:
    """Return what `make` returns and "", or None and the line of its FedError; anything else fails the test."""
    with watched():
        try:
            return make(), ""
        except FedError as error:
            message = str(error)
    assert message
    assert not _NOT_FOR_PRINT.search(message), ascii(message)
    assert len(message) < 2000
    return None, message
