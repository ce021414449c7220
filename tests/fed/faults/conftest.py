"""Counts of the faults that were tried, printed after the tests and, with `--faults`, written to a file."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.interrupted_runs import Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    """Counts the outcomes of one test's faults."""
    counts = Tally()
    yield counts
    record_property("faults", {"test": request.node.name, "outcomes": dict(counts.outcomes)})


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush nothing to the real disk, which takes longer than these runs and is lost only with the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print, and write, the counts of all tests."""
    found = {}
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if getattr(report, "when", None) == "teardown":
            for name, value in report.user_properties:
                if name == "faults":
                    found[value["test"]] = dict(sorted(value["outcomes"].items()))
                    terminalreporter.write_line(f"faults: {value['test']}: {found[value['test']]}")
    if (path := config.getoption("faults")) is not None:
        Path(path).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
