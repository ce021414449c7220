"""The progress that a comparison shows on the terminal."""

from __future__ import annotations

import pytest

from fed import console
from fed.console import ComparisonProgress, Screen, duration
from fed.experiments import plan as plans
from tests.support.saved_runs import make_row


def play(cells: list[plans.Cell], already: int) -> ComparisonProgress:
    with ComparisonProgress(Screen(), cells, already) as shown:
        shown.on_event(cells[0], "base", "making the base model of seed 0")
        for number in range(3):
            shown.on_event(cells[0], "row", make_row(number))
        shown.on_event(cells[0], "event", "round 2: client 3 is left out")
        shown.on_event(cells[0], "finished", make_row(2))
        shown.on_event(cells[1], "row", make_row(0))
        shown.on_event(cells[1], "failed", "no such file")
    return shown


@pytest.fixture
def cells() -> list[plans.Cell]:
    asked = plans.request("digits", ["rounds=2"], ["fed-plora", "fedit"], (0,))
    return list(plans.plan(asked).cells)


def test_without_a_terminal_every_finished_run_is_a_line_with_the_time_left(
    cells: list[plans.Cell], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    times = iter((100.0, 130.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    shown = play(cells, already=8)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "making the base model of seed 0",
        "run  9 of 10  accuracy 30.0 %  Fed-PLoRA, seed 0  (30 s left)",
    ]
    assert err.splitlines() == [
        "warning: Fed-PLoRA, seed 0: round 2: client 3 is left out",
        "warning: FedIT (rank 16), seed 0 cannot be played: no such file",
    ]
    assert shown.failures == ["FedIT (rank 16), seed 0: no such file"]


def test_what_the_data_have_to_say_is_said_once_and_not_again(
    cells: list[plans.Cell], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with ComparisonProgress(Screen(), cells, 0, told=["1 row is left"]) as shown:
        for cell, line in ((cells[0], "1 row is left"), (cells[0], "2 rows are left"), (cells[1], "2 rows are left")):
            shown.on_event(cell, "data", line)
    assert capsys.readouterr().err == "warning: Fed-PLoRA, seed 0: 2 rows are left\n"


def test_on_a_terminal_there_are_bars_for_all_rounds_and_the_run(
    cells: list[plans.Cell], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    play(cells, already=0)
    out = capsys.readouterr().out
    for shown in ("━", "2/4", "1 of 2", "run 1 of 2  accuracy 30.0 %  Fed-PLoRA, seed 0", "cannot be played"):
        assert shown in out


def test_durations_in_words() -> None:
    words = {0.4: "0 s", 119: "119 s", 150: "2 min", 7100: "118 min", 9000: "2.5 h"}
    assert {seconds: duration(seconds) for seconds in words} == words
