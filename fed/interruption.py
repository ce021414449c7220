"""Ctrl-C and SIGTERM, which both raise KeyboardInterrupt: at once, or while a run is played at safe points alone.

A KeyboardInterrupt that may come anywhere also comes inside libraries that turn it into an error of their own, and
between two changes of a model that belong together. So a run notes the signal, and asks for it between steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Signals:
    """What is known of signals: whether one waits to be raised, and whether there was one since `listen`."""

    deferred = 0
    waiting = False
    came = False


def _raise(number: int, frame: FrameType | None) -> None:
    _Signals.came = True
    raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    _Signals.came = _Signals.waiting = True


def listen() -> None:
    """Let SIGTERM raise KeyboardInterrupt as Ctrl-C does, from now on; to be called in a process's main thread."""
    _Signals.came = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise)


def came() -> bool:
    """Return whether there was Ctrl-C or SIGTERM since `listen`, even if a library made another error of it."""
    return _Signals.came


def check() -> None:
    """Raise KeyboardInterrupt if there was Ctrl-C or SIGTERM since `deferred` began; this is called at safe points."""
    if _Signals.waiting:
        _Signals.waiting = False
        raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[None]:
    """Within the context, Ctrl-C and SIGTERM take effect at calls of `check` and at the context's end.

    SIGTERM does so only after `listen`, and no signal does that is ignored or handled otherwise, nor in a thread.
    """
    if threading.current_thread() is not threading.main_thread() or _Signals.deferred:
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if handler in (signal.default_int_handler, _raise)]
    _Signals.deferred, _Signals.waiting = 1, False
    for number in ours:
        signal.signal(number, _note)
    try:
        yield
    except BaseException:
        _Signals.waiting = False  # what ends the context already is enough
        raise
    finally:
        _Signals.deferred = 0
        for number in ours:
            signal.signal(number, before[number])
    check()
