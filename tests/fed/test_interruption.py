"""Signals while a run is played: they wait for a safe point, and are not lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from fed import interruption


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_a_safe_point(number: int) -> None:
    passed = []

    @interruption.deferred()
    def play() -> None:
        interruption.check()
        os.kill(os.getpid(), number)
        passed.append("between two changes")
        interruption.check()
        passed.append("after the safe point")

    interruption.listen()
    with pytest.raises(KeyboardInterrupt):
        play()
    assert passed == ["between two changes"]
    assert interruption.came()
    interruption.check()  # it is raised once


def test_a_signal_without_a_safe_point_is_raised_at_the_end() -> None:
    reached = []

    @interruption.deferred()
    def play() -> None:
        with interruption.deferred():  # within another, it is no end
            os.kill(os.getpid(), signal.SIGINT)
        reached.append(True)

    interruption.listen()
    with pytest.raises(KeyboardInterrupt):
        play()
    assert reached
    with interruption.deferred():
        interruption.check()


def test_another_error_is_not_hidden_by_a_signal() -> None:
    @interruption.deferred()
    def play() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("disk")

    interruption.listen()
    with pytest.raises(OSError, match="disk"):
        play()
    interruption.check()


def test_signals_that_are_ignored_or_end_the_process_stay_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with interruption.deferred():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)
        interruption.check()
