"""The ClientApp: hands each message to this machine's trainer, and keeps a copy of what clients keep in the context.

Flower imports this file for every message, so it loads neither torch nor a model.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fed.flower import frames
from fed.flower.protocol import JOIN, TRAIN
from fed.flower.trainer import KEY, LOG, SOCKET
from fed.flower.watch import is_working

START_SECONDS = 120.0  # for Python to start and open the socket

_KEPT = "own-"  # begins the names of records that stay on the machine

app = ClientApp()


@app.query()
def join(message: Message, context: Context) -> Message:
    """Let this machine join a run."""
    with _noted(message, context):
        return _handed_over(JOIN, message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients of a message; what they keep on this machine stays in the context, too."""
    with _noted(message, context):
        with_kept(message.content, context)
        reply = _handed_over(TRAIN, message, context)
        keep(reply.content, context)
        return reply


@app.query("working")
def working(message: Message, context: Context) -> Message:
    """Say whether this machine works on a message."""
    return is_working(message, lambda number: _note(context, number).exists())


def with_kept(content: RecordDict, context: Context) -> None:
    """Add to a message what the clients of this machine kept, in case the trainer's folder has lost it."""
    for name, record in context.state.items():
        if name.startswith(_KEPT) and isinstance(record, ArrayRecord) and name not in content:
            content[name] = record


def keep(content: RecordDict, context: Context) -> None:
    """Move what clients keep from a reply to the context, and delete what they kept before.

    `own-CLIENT.round-NUMBER.from-BEFORE` of a reply, kept after round NUMBER, becomes `own-CLIENT.round-NUMBER`; that
    of round BEFORE, from which the client trained, stays, because the server may refuse the update.
    """
    for name in [name for name in content if name.startswith(_KEPT)]:
        kept, _, before = name.partition(".from-")
        client = kept.partition(".")[0]
        for own in [own for own in context.state if own.partition(".")[0] == client]:
            if own not in (kept, f"{client}.round-{before}"):
                del context.state[own]
        context.state[kept] = content.pop(name)


def _handed_over(kind: str, message: Message, context: Context) -> Message:
    with _connection(_folder(context)) as connection:
        frames.send(connection, kind, dict(context.node_config), message.content)
        outcome, facts, content = frames.receive(connection)
    if outcome == "error":
        raise RuntimeError(f"the trainer failed: {facts['reason']}")
    return Message(content, reply_to=message)


@contextmanager
def _noted(message: Message, context: Context) -> Iterator[None]:
    """Note, in the folder of this SuperNode, that it works on a message."""
    note = _note(context, message.metadata.message_id)
    note.touch()
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _note(context: Context, number: str) -> Path:
    return _folder(context) / f"works-on-{hashlib.blake2b(number.encode(), digest_size=16).hexdigest()}"


def _connection(folder: Path) -> Connection:
    """Return a connection to the trainer, which is started if it is not there."""
    key = folder / KEY
    if (folder / SOCKET).exists():
        try:
            return Client(str(folder / SOCKET), "AF_UNIX", authkey=key.read_bytes())
        except OSError:  # it ended without removing its socket
            (folder / SOCKET).unlink(missing_ok=True)
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
    with (folder / LOG).open("ab") as log:
        command = [sys.executable, "-m", "fed.flower.trainer", str(folder), str(os.getppid())]
        trainer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS and trainer.poll() is None:
        if (folder / SOCKET).exists():
            try:
                return Client(str(folder / SOCKET), "AF_UNIX", authkey=key.read_bytes())
            except ConnectionRefusedError:  # it does not listen yet
                pass
        time.sleep(0.02)
    trainer.kill()
    raise RuntimeError(f"the trainer did not start; its log ends with: {(folder / LOG).read_text()[-2000:]}")


def _folder(context: Context) -> Path:
    """Return the folder of this SuperNode's trainer, which only its user may enter."""
    # One of a SuperNode: its id is new whenever it starts, unless it has a key, and its SuperExec's number is always.
    own = hashlib.blake2b(f"{context.node_id} {os.getppid()}".encode(), digest_size=8).hexdigest()
    users = Path(tempfile.gettempdir()) / f"plora-fed-{os.getuid()}"
    users.mkdir(mode=0o700, exist_ok=True)
    if users.is_symlink() or users.stat().st_uid != os.getuid() or users.stat().st_mode & 0o077:
        raise RuntimeError(f"{users} should be a folder that only this user may enter")
    folder = users / own
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
