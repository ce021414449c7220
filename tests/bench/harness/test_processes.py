"""Work in other processes: results, errors, crashes and time-outs are all reported."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.harness.processes import LostProcessError, Outcome, Workers, note, one_line, outcomes


def act(what: str) -> str:
    """Do what `item` says: return a result, raise, crash or hang."""
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
        with Workers(act, workers, 1.0) as pool:
            assert list(pool.outcomes(["a"], time.monotonic() - 1)) == []


def test_what_is_not_done_at_the_end_is_stopped_and_left() -> None:
    with Workers(act, 1, 600.0) as pool:
        pool.await_ready(60.0)
        began = time.monotonic()
        found = list(pool.outcomes(["a", "hang", "b"], end=began + 1.0))
    assert found == [(0, Outcome("A"))]
    assert time.monotonic() - began < 20.0


def test_a_failure_a_death_and_a_hang_cost_one_item_each() -> None:
    items = ["a", "fail", "die", "hang", "b", "c"]
    found = dict(outcomes(act, items, workers=2, seconds_each=2.0))
    assert {place: outcome.value for place, outcome in found.items() if not outcome.error} == {0: "A", 4: "B", 5: "C"}
    assert found[1] == FAILED
    assert found[2].error == "its process ended with status 7"
    assert found[3].error == "not done after 2 s; its process was stopped"


def test_a_list_s_time_need_not_be_that_of_starting_python() -> None:
    with Workers(act, 2, seconds_each=60.0) as workers:
        workers.await_ready(60.0)
        limit = time.monotonic() + 1.0
        found = dict(workers.outcomes(["a", "b"], limit, limit))
    assert found == {0: Outcome("A"), 1: Outcome("B")}


def test_waiting_for_processes_ends() -> None:
    began = time.monotonic()
    with Workers(act, 1, seconds_each=60.0) as workers:
        workers.await_ready(0.0)
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize(("error", "line"), [(ValueError("\n a \n b"), "ValueError: a"), (KeyError(), "KeyError")])
def test_errors_become_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def tell(what: str) -> str:
    """Note what is done on the way to doing it; `lost` gives its process up."""
    note("began")
    if what == "lost":
        raise LostProcessError("the device is gone")
    note(what)
    return act(what)


def test_what_was_noted_outlives_failures_deaths_and_limits() -> None:
    items = ["a", "fail", "die", "hang", "lost", "b"]
    for workers, some in ((1, items), (0, ["a", "fail", "lost"])):
        found = dict(outcomes(tell, some, workers=workers, seconds_each=1.0))
        noted = {some[position]: outcome.notes for position, outcome in found.items()}
        assert noted == {what: ("began",) if what == "lost" else ("began", what) for what in some}
        assert found[some.index("lost")].error == "the device is gone"
        assert found[0].value == "A"


def test_at_the_end_what_was_noted_comes_back_as_cut() -> None:
    with Workers(tell, 1, 600.0) as pool:
        pool.await_ready(60.0)
        began = time.monotonic()
        ((position, outcome),) = pool.outcomes(["hang"], end=began + 1.0)
    assert (position, outcome.value, outcome.notes, outcome.cut) == (0, None, ("began", "hang"), True)
    assert time.monotonic() - began < 20.0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_list_may_grow_while_it_is_worked_through(workers: int) -> None:
    items = ["a"]
    found = []
    for position, outcome in outcomes(act, items, workers=workers, seconds_each=60.0):
        found.append((position, outcome.value))
        if len(items) < 3:
            items.append("b" * len(items))
    assert found == [(0, "A"), (1, "B"), (2, "BB")]


def test_a_worker_that_died_while_idle_costs_nothing() -> None:
    with Workers(act, 1, 60.0) as pool:
        assert list(pool.outcomes(["a"])) == [(0, Outcome("A"))]
        pool._workers[0].process.kill()
        pool._workers[0].process.join()
        assert [outcome.value for _, outcome in pool.outcomes(["b", "c"])] == ["B", "C"]


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from bench.harness.processes import Workers
from tests.bench.harness.test_processes import act
if __name__ == "__main__":
    with Workers(act, 1, 600.0) as pool:
        list(pool.outcomes(["a"]))
        Path({str(tmp_path / "pid")!r}).write_text(str(pool._workers[0].process.pid))
        list(pool.outcomes(["hang"]))
"""
    (tmp_path / "script.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env=env)
    end = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(0.5)
    process.kill()
    process.wait()
    child = int((tmp_path / "pid").read_text())
    while time.monotonic() < end and Path(f"/proc/{child}").exists() and "Z" not in _state(child):
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists() or "Z" in _state(child)


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return "Z"
