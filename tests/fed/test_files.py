"""Files are written completely or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fed.files import read_text, replacing, why_not_utf8, write_atomically


def write_half(path: Path, error: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error


def test_text_and_bytes_take_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    assert write_atomically(path, "größer\n") == path
    assert path.read_bytes() == "größer\n".encode()
    write_atomically(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_what_is_interrupted_leaves_the_old_file_and_nothing_beside_it(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(type(error)):
        write_half(path, error)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(OSError, match=r"No space left on device: .*a'"):
        write_half(path, OSError(errno.ENOSPC, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_file_that_was_to_be_written_or_the_other_one_it_is_about(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(FileNotFoundError) as missing:
        write_atomically(folder / "a", "text")
    assert missing.value.filename == str(folder / "a")
    with pytest.raises(FileNotFoundError) as other:
        write_half(tmp_path / "b", FileNotFoundError(errno.ENOENT, "No such file or directory", "rows.jsonl"))
    assert other.value.filename == "rows.jsonl"


@pytest.mark.parametrize("content", ["größer\n\n", "\ufeffgrößer\n\n", "größer\r\n\r\n", "\ufeffgrößer\r\r"])
def test_text_is_read_without_a_mark_and_with_one_line_end(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").write_bytes(content.encode())
    assert read_text(tmp_path / "a") == "größer\n\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"one\ntw\xff", "byte 0xff in line 2 is not UTF-8"),
        (b"\xc3", "byte 0xc3 in line 1 is not UTF-8"),
        ("one".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b"\xfe\xff" + "one".encode("utf-16-be"), "it is UTF-16; save it as UTF-8"),
        ("one".encode("utf-32"), "it is UTF-32; save it as UTF-8"),
        ("\none".encode("utf-16-be"), "line 1 holds a NUL byte, as UTF-16 text does; save it as UTF-8"),
        (b"one\n\0", "line 2 holds a NUL byte, as UTF-16 text does; save it as UTF-8"),
    ],
)
def test_what_is_not_utf8_is_refused_by_its_mark_or_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{reason}$"):
        read_text(tmp_path / "a")
    assert why_not_utf8(tmp_path / "a") == reason
