"""The progress of a run: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import pytest

from fed.console import Screen, round_note


def show(screen: Screen) -> None:
    with screen.stage("round", 20, every=10) as advance:
        for done in range(21):
            advance(done, f"note {done}")
    with screen.wait("centralised: 7 steps"):
        pass
    screen.warn("client 3 is left out")


def test_without_a_terminal_there_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    show(Screen())
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "round  0/20  note 0",
        "round 10/20  note 10",
        "round 20/20  note 20",
        "centralised: 7 steps",
    ]
    assert err == "warning: client 3 is left out\n"


def test_on_a_terminal_there_are_bars_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    show(Screen())
    out = capsys.readouterr().out
    for shown in ("20/20", "note 20", "left", "━", "\x1b"):
        assert shown in out


def test_a_rounds_note_names_its_units() -> None:
    row = {"accuracy": 0.8751, "loss": 0.12345, "train_seconds": 1.26}
    assert round_note(row) == "accuracy 87.5 %  loss 0.123  1.3 s"
    assert round_note(row | {"loss": None}) == "accuracy 87.5 %  loss not finite  1.3 s"
