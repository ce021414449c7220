"""The trainer as a process of its own, without Flower: it answers, survives bad callers, and ends when it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from fed.flower import client_app, frames
from fed.flower.protocol import JOIN, TRAIN
from fed.flower.trainer import KEY, LOG, SOCKET

SECONDS = 60.0  # for a process to start or end on a busy machine


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


class Place:
    """A trainer's folder, the process that it ends with, and the trainers that were started there."""

    def __init__(self, folder: Path, parent: subprocess.Popen[bytes]) -> None:
        self.folder, self.parent = folder, parent
        self.trainers: list[subprocess.Popen[bytes]] = []

    def ask(self, kind: str, facts: dict[str, Any] | None = None) -> tuple[str, dict[str, Any], RecordDict]:
        """Hand a message over, as the ClientApp does, and return what came back."""
        content = RecordDict() if facts is None else RecordDict({"facts": ConfigRecord({"json": json.dumps(facts)})})
        with client_app._connection(self.folder) as connection:
            frames.send(connection, kind, {}, content)
            return frames.receive(connection)

    def lacks(self) -> str:
        """Return what the trainer says that it lacks when it is to train at once."""
        outcome, _, content = self.ask(TRAIN)
        assert outcome == "reply"
        return str(json.loads(str(content["facts"]["json"]))["lacks"])


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("t")  # a socket's path has room for some hundred characters
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as parent:
        own = Place(folder, parent)

        def start(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
            own.trainers.append(subprocess.Popen(*arguments, **settings))
            return own.trainers[-1]

        monkeypatch.setattr(client_app, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
        monkeypatch.setattr(client_app.os, "getppid", lambda: parent.pid)
        try:
            yield own
        finally:
            for process in (*own.trainers, parent):
                process.kill()
                process.wait()


def test_one_process_answers_all_messages_and_tells_errors(place: Place) -> None:
    assert place.lacks() == "the run"
    outcome, facts, _ = place.ask(JOIN, {})
    assert (outcome, facts) == ("error", {"reason": "KeyError: 'versions'"})
    outcome, _, content = place.ask(JOIN)
    assert (outcome, json.loads(str(content["facts"]["json"]))["refused"]) == ("reply", "it has no facts")
    assert place.lacks() == "the run"
    assert len(place.trainers) == 1
    assert "KeyError: 'versions'" in (place.folder / LOG).read_text()
    assert (place.folder / KEY).stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_callers_that_are_none_of_ours_end_nothing(place: Place) -> None:
    assert place.lacks() == "the run"
    path = str(place.folder / SOCKET)
    with pytest.raises(AuthenticationError):
        Client(path, "AF_UNIX", authkey=b"a guess")
    key = (place.folder / KEY).read_bytes()
    for sent in (b"", b"no JSON", b"[" * 100_000, b"{}", b'{"kind": 1, "facts": 2, "records": [[]]}'):
        with Client(path, "AF_UNIX", authkey=key) as connection:
            connection.send_bytes(sent)
    with Client(path, "AF_UNIX", authkey=key):
        pass  # it says nothing, and goes
    assert place.lacks() == "the run"
    assert len(place.trainers) == 1


@pytest.mark.slow
def test_a_trainer_that_was_killed_is_started_anew(place: Place) -> None:
    assert place.lacks() == "the run"
    place.trainers[0].send_signal(signal.SIGKILL)
    place.trainers[0].wait()
    assert (place.folder / SOCKET).exists()
    assert place.lacks() == "the run"
    assert len(place.trainers) == 2


def test_a_trainer_ends_with_its_parent_and_removes_its_folder(place: Place) -> None:
    assert place.lacks() == "the run"
    place.parent.kill()
    place.parent.wait()
    assert place.trainers[0].wait(SECONDS) == 0
    wait_until(lambda: not place.folder.exists())


def test_a_trainer_that_does_not_start_shows_its_log(place: Place) -> None:
    place.folder = place.folder / ("x" * 120)
    place.folder.mkdir()
    with pytest.raises(
        RuntimeError, match=r"(?s)the trainer did not start; its log ends with: .*AF_UNIX path too long"
    ):
        place.ask(TRAIN)
    assert place.trainers[0].wait(SECONDS) != 0


def _context() -> Any:
    return SimpleNamespace(node_id=7)


def test_only_the_user_may_enter_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = client_app._folder(_context())
    assert folder == client_app._folder(_context())
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    folder.parent.chmod(0o755)
    with pytest.raises(RuntimeError, match="should be a folder that only this user may enter"):
        client_app._folder(_context())


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"plora-fed-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="should be a folder that only this user may enter"):
        client_app._folder(_context())
    assert list((tmp_path / "elsewhere").iterdir()) == []
