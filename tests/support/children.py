"""Forked children of the test process, which may die at any point."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
import torch

KILLED = 137
# A process's first backward starts a thread for each device; if there is one, no forked child can run a backward. The
# builds of torch for CUDA count a stand-in, too, once shapes were computed without values. So the first one is run
# here, before any test.
torch.ones((), requires_grad=True).backward()

Tell = Callable[[object], None]


@dataclass(frozen=True)
class Ending:
    """How a child ended: its exit status, what it told before, and what its work returned, if it came that far."""

    status: int
    told: list[Any]
    value: Any = None


def in_child(work: Callable[[Tell], Any], seconds: float = 120) -> Ending:
    """Do some work in a forked child; `work` gets a function that sends a value to this process at once.

    Raises AssertionError with the child's traceback if the work raises, or if it takes longer than `seconds`.
    """
    if torch.cuda.is_available():
        pytest.skip("forked children cannot run a backward beside a GPU: hide it, by CUDA_VISIBLE_DEVICES= in front")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _work_and_exit(work, writer)
    os.close(writer)
    sent, whole = _read(reader, time.monotonic() + seconds)
    os.close(reader)
    if not whole:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert whole, f"the child did not end within {seconds} s"
    told, value = [], None
    for kind, payload in _unpickled(sent):
        assert kind != "raised", payload
        if kind == "told":
            told.append(payload)
        else:
            value = payload
    return Ending(status, told, value)


def die() -> NoReturn:
    """End this process at once, as SIGKILL would: nothing is flushed and nothing cleaned up."""
    os._exit(KILLED)


def _work_and_exit(work: Callable[[Tell], Any], writer: int) -> NoReturn:
    sys.dont_write_bytecode = True

    def send(kind: str, payload: object) -> None:
        content = memoryview(pickle.dumps((kind, payload)))
        while content:
            content = content[os.write(writer, content) :]

    status = 1
    try:
        send("returned", work(lambda payload: send("told", payload)))
        status = 0
    except BaseException as error:
        send("raised", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    finally:
        os._exit(status)


def _read(reader: int, deadline: float) -> tuple[bytes, bool]:
    """Return what comes through the pipe, and whether it was closed in time."""
    parts: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reader], [], [], left)[0]:
            break
        if not (part := os.read(reader, 1 << 16)):
            return b"".join(parts), True
        parts.append(part)
    return b"".join(parts), False


def _unpickled(sent: bytes) -> list[tuple[str, Any]]:
    from io import BytesIO

    stream, found = BytesIO(sent), []
    while stream.tell() < len(sent):
        found.append(pickle.load(stream))
    return found
