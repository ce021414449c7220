"""Locks of directories: one process and thread at a time, whatever the directory is called meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fed.errors import FedError
from fed.locks import LOCK, held, is_held

TRY = """
import sys
from pathlib import Path
from fed.errors import FedError
from fed.locks import held
try:
    with held(Path(sys.argv[1])):
        print("held")
except FedError as error:
    print(error)
"""


# The holder's number is written while another process waits for it.
LATER = """
import sys, time
from pathlib import Path
from fed import locks
wait = time.sleep
def write(seconds):
    Path(sys.argv[1], locks.LOCK).write_text(sys.argv[2])
    wait(seconds)
locks.time.sleep = write
"""


def other_process(directory: Path) -> str:
    command = [sys.executable, "-c", TRY, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_another_process_is_refused_by_name_until_the_end(tmp_path: Path) -> None:
    with held(tmp_path):
        assert is_held(tmp_path)
        assert other_process(tmp_path) == (
            f"{str(tmp_path)!r} is in use by process {os.getpid()}; wait until it ends, or end it"
        )
    assert not is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert other_process(tmp_path) == "held"


@pytest.mark.parametrize("before", ["", "99999999999", "4194305"])
def test_the_number_of_a_process_that_has_just_taken_the_lock_is_waited_for(before: str, tmp_path: Path) -> None:
    """The last two are of no process: larger than a number may be."""
    with held(tmp_path):
        (tmp_path / LOCK).write_text(before)
        assert "is in use by process " + (before or "(unknown)") in other_process(tmp_path)
        command = [sys.executable, "-c", LATER + TRY, str(tmp_path), str(os.getpid())]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"is in use by process {os.getpid()};" in said


def test_a_directory_stays_held_under_another_name(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    with held(before):
        before.rename(after)
        with held(after):  # again by the same thread
            assert "is in use by process" in other_process(after)
        assert is_held(after)
    assert list(after.iterdir()) == []


def test_another_thread_is_refused(tmp_path: Path) -> None:
    def hold() -> None:
        with held(tmp_path):
            pass

    with held(tmp_path), ThreadPoolExecutor(1) as pool, pytest.raises(FedError, match="by another thread"):
        pool.submit(hold).result()


def test_what_a_killed_process_left_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("12345678")
    assert not is_held(tmp_path)
    with held(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())


def test_a_file_system_without_locks_is_said_and_one_that_fails_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        def flock(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)

    fail(errno.ENOLCK)
    with pytest.warns(UserWarning, match="cannot be locked here: let one process alone work in it"), held(tmp_path):
        pass
    fail(errno.EIO)
    with pytest.raises(FedError, match="cannot be locked: Input/output error"), held(tmp_path):
        pass


def test_what_cannot_be_held_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FedError, match=r"nowhere' cannot be written: No such file"), held(tmp_path / "nowhere"):
        pass
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FedError, match="cannot be written: Too many levels of symbolic links"), held(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
