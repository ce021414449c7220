"""Text that is safe to print, and errors of one line."""

from __future__ import annotations

import pickle

import pytest

from fed.errors import FedError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größer → Ω", "größer → Ω"),
        ("\x1b[2J\a", r"\x1b[2J\x07"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\x7f\x80\x9b31m", r"\x7f\x80\x9b31m"),
        ("abc\u202edcba\u2066", r"abc\u202edcba\u2066"),
        ("\ud800", r"\ud800"),
        ("a\u2028b", r"a\u2028b"),
    ],
)
def test_what_is_not_for_print_is_shown_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_is_kept_stays() -> None:
    assert printable("a\nb\x1b", kept="\n") == "a\nb\\x1b"


def test_an_error_is_one_line_and_stays_the_same_in_another_process() -> None:
    error = FedError("'a\x1b[2J' is wrong:\n   it \\ should be\r\n right\n")
    assert str(error) == r"'a\x1b[2J' is wrong: it \ should be right"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_error_does_not_fill_the_screen() -> None:
    message = str(FedError(f"data.text is {'x' * 10**6}; it should be shorter"))
    assert len(message) == 1503
    assert message.startswith("data.text is xxx")
    assert message.endswith("xxx; it should be shorter")
    assert str(FedError(message)) == message
