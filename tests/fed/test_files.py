"""Files are written completely or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fed.files import replacing, write_atomically


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
