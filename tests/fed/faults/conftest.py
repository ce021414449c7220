"""Counts of the faults that were tried, printed after the tests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from tests.support.interrupted_runs import Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    """Counts the outcomes of one test's faults."""
    counts = Tally()
    yield counts
    record_property("faults", f"{request.node.name}: {counts}")


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush nothing to the real disk, which takes longer than these runs and is lost only with the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts of all tests."""
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if getattr(report, "when", None) == "teardown":
            for name, value in report.user_properties:
                if name == "faults":
                    terminalreporter.write_line(f"faults: {value}")
