"""The process that trains on a machine: it holds the run's data and model for as long as the SuperNode lives.

Flower starts a process for every message. To load the model once, and not for every message, that process only hands
its message over to this one, which `fed.flower.client_app` starts with `python -m fed.flower.trainer FOLDER PARENT`
when it does not find it. FOLDER, which only its user may enter, holds the socket, the key that both ends prove to each
other that they have, and a log. The trainer ends when the process PARENT does, Flower's SuperExec, or when it was not
called for `IDLE_SECONDS`.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fed.flower import frames
from fed.flower.protocol import JOIN

SOCKET, KEY, LOG = "socket", "key", "log"
IDLE_SECONDS = 12 * 3600.0


def main(folder: Path, parent: int) -> None:
    """Answer messages until the process `parent` ends."""
    trainer = Trainer(folder)
    threading.Thread(target=_end_with, args=(parent, trainer), daemon=True).start()
    with Listener(str(folder / SOCKET), "AF_UNIX", backlog=16, authkey=(folder / KEY).read_bytes()) as listener:
        while True:
            try:
                with listener.accept() as connection:
                    trainer.answer(connection)
            except Exception:  # a caller that was killed, or is none of ours; the next one is answered all the same
                traceback.print_exc()


class Trainer:
    """Answers the messages of a SuperNode, one at a time; `machine` is there once a run was joined."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for path in folder.glob("run-*"):  # of a trainer that was killed
            shutil.rmtree(path, ignore_errors=True)
        self._machine: Any = None
        self._joined = 0
        self.called = time.monotonic()

    def answer(self, connection: Connection) -> None:
        """Answer one message; what goes wrong in it is told to the caller."""
        kind, facts, content = frames.receive(connection)
        self.called = time.monotonic()
        try:
            reply = self._join(content, facts) if kind == JOIN else self._train(content)
        except Exception as error:
            traceback.print_exc()
            frames.send(connection, "error", {"reason": f"{type(error).__name__}: {error}"}, RecordDict())
        else:
            frames.send(connection, "reply", {}, reply)
        finally:
            self.called = time.monotonic()

    def _join(self, content: RecordDict, node: dict[str, Any]) -> RecordDict:
        from fed.flower.machine import join  # it loads torch, for which the socket need not wait

        if self._machine is not None:
            self._machine.close()
            self._machine = None
        self._joined += 1
        place = self._folder / f"run-{self._joined}"
        shutil.rmtree(self._folder / f"run-{self._joined - 1}" / "base", ignore_errors=True)
        self._machine, reply = join(content, node, place, lambda line: print(line, flush=True))
        return reply

    def _train(self, content: RecordDict) -> RecordDict:
        from fed.flower.machine import train
        from fed.flower.records import FACTS, facts_record

        if self._machine is None:
            return RecordDict({FACTS: facts_record({"lacks": "the run"})})
        return train(self._machine, content)


def _end_with(parent: int, trainer: Trainer) -> None:
    """End this process, and remove its folder, once `parent` has ended or nobody has called for long."""
    began = _began(parent)  # by which a later process of the same number is told from it
    while began is not None and _began(parent) == began and time.monotonic() - trainer.called < IDLE_SECONDS:
        time.sleep(1)
    shutil.rmtree(trainer._folder, ignore_errors=True)
    os._exit(0)  # the main thread may be in the middle of training, whose result nobody waits for


def _began(process: int) -> str | None:
    """Return when a process began, in the system's clock ticks; None if it has ended."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else fields[18]  # the 22nd field of all, as `man proc` counts them
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
