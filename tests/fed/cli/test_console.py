"""The progress of a run: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import os

import pytest

from fed.console import ONGOING, Screen, round_note
from fed.errors import UnreadError


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
    texts = {"tokens_per_second": 1234.5, "padding_share": 0.0951}
    assert round_note(row | texts) == "accuracy 87.5 %  loss 0.123  1.3 s  1234 tokens/s, 10% padding"
    assert round_note(row | dict.fromkeys(texts)) == round_note(row)
    assert round_note(row | {"accuracy": None}).startswith("accuracy      —  loss")
    assert round_note(row | {"loss": None}) == "accuracy 87.5 %  loss not finite  1.3 s"


HOSTILE = "a\x1b[2J\x07\x9b31m\u202e[bold]b[/bold] :smile:"
SHOWN = r"a\x1b[2J\x07\x9b31m\u202e[bold]b[/bold] :smile:"


@pytest.mark.parametrize("terminal", [False, True])
def test_names_from_files_are_shown_escaped_and_as_they_are(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    else:
        monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    screen = Screen()
    screen.say(f"{HOSTILE}\nsecond line")
    screen.warn(HOSTILE)
    screen.table([("name", HOSTILE), (HOSTILE, "1")])
    with screen.stage(HOSTILE, 1) as advance:
        advance(1, HOSTILE)
    with screen.wait(HOSTILE):
        pass
    out, err = capsys.readouterr()
    assert out.count(SHOWN) >= 6
    assert f"{SHOWN}\nsecond line" in out
    assert err == f"warning: {SHOWN}\n"
    assert HOSTILE[:4] not in out
    assert "\u202e" not in out
    assert "\x9b" not in out


def test_a_command_ends_if_nobody_reads_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        screen = Screen()
        with pytest.raises(UnreadError):
            screen.say("a line")
        screen.say("another, which nobody misses")


def test_a_command_goes_on_if_nobody_reads_its_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as unread:
        monkeypatch.setattr("sys.stderr", unread)
        screen = Screen()
        screen.warn("a warning")
        screen.say("a line")
    assert capsys.readouterr().out == "a line\n"


def test_progress_within_a_round_is_a_bars_note_or_a_line_every_half_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    clock = [0.0]
    monkeypatch.setattr("fed.console.time.monotonic", lambda: clock[0])
    screen, noted = Screen(), list[tuple[int, str]]()
    show = screen.inner_progress(lambda done, note: noted.append((done, note)))
    for second in (1, 29, 31, 40, 62):
        clock[0] = float(second)
        show("answers", second, 70)
    assert capsys.readouterr().out.splitlines() == ["  answers 31/70", "  answers 62/70"]
    assert noted == []
    screen.is_terminal = True
    show("answers", 64, 70)
    assert noted == [(ONGOING, "answers 64/70")]


def test_progress_within_a_round_leaves_a_bar_where_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen()
    with screen.stage("round", 20) as advance:
        advance(7, "a round")
        screen.inner_progress(advance)("answers", 3, 9)
    out = capsys.readouterr().out
    assert "7/20" in out
    assert "answers 3/9" in out
    assert "-1/20" not in out
