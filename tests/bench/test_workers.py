"""Work in other processes: answers, failures, deaths and silence all come back."""

import os
import time

import pytest

from bench.workers import Outcome, one_line, outcomes


def act(what: str) -> str:
    """Do as told: answer, fail, die or hang."""
    if what == "fail":
        raise ValueError("no such kernel\nmore lines")
    if what == "die":
        os._exit(7)
    if what == "hang":
        time.sleep(600)
    return what.upper()


FAILED = Outcome(error="ValueError: no such kernel")


def test_without_workers_it_runs_here_and_in_order() -> None:
    found = list(outcomes(act, ["a", "fail", "b"], workers=0, seconds_each=1.0))
    assert found == [(0, Outcome("A")), (1, FAILED), (2, Outcome("B"))]


def test_nothing_is_begun_after_the_deadline() -> None:
    for workers in (0, 1):
        assert list(outcomes(act, ["a"], workers=workers, seconds_each=1.0, deadline=time.monotonic() - 1)) == []


def test_what_is_not_done_at_the_end_is_stopped_and_left() -> None:
    began = time.monotonic()
    found = list(outcomes(act, ["a", "hang", "b"], workers=1, seconds_each=600.0, end=began + 8.0))
    assert found == [(0, Outcome("A"))]
    assert time.monotonic() - began < 30.0


def test_a_failure_a_death_and_a_hang_cost_one_item_each() -> None:
    items = ["a", "fail", "die", "hang", "b", "c"]
    found = dict(outcomes(act, items, workers=2, seconds_each=2.0))
    assert {position: outcome.value for position, outcome in found.items() if outcome.error is None} == {
        0: "A",
        4: "B",
        5: "C",
    }
    assert found[1] == FAILED
    assert found[2].error == "its process ended with status 7"
    assert found[3].error == "not done after 2 s; its process was stopped"


@pytest.mark.parametrize(("error", "line"), [(ValueError("\n a \n b"), "ValueError: a"), (KeyError(), "KeyError")])
def test_errors_become_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line
