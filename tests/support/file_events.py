"""Every change that this process makes to the files below a folder, as an event at which it can die, fail or record.

Python reports the changes to audit hooks, before they are made. Flushing to the disk and safetensors' writing are not
reported, so these functions are replaced. Nothing is flushed to the real disk: the processes die, the machine does not.
Neither hooks nor replacements are taken back, so events are watched in forked children only (`tests.support.children`).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# The audited changes: the position of each path among the event's arguments, with that of its directory's descriptor.
_AUDITED = {
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
}


@dataclass(frozen=True)
class FileEvent:
    """One change: its number from 1, what it does ("open", "write", "sync", "rename", …), and the paths it affects.

    A rename has two paths, from and to. "open" is opening for writing, "write" is safetensors writing a whole file,
    "sync" and "sync folder" are flushing to the disk.
    """

    number: int
    kind: str
    paths: tuple[Path, ...]
    truncates: bool = False

    def __str__(self) -> str:
        return f"{self.number} {self.kind} {' '.join(path.name for path in self.paths)}"


def watch(root: Path, before: Callable[[FileEvent], object]) -> None:
    """From now on, call `before` before every change below `root`; what it raises, the change raises."""
    _Watch(root.resolve(), before).begin()


class _Watch:
    def __init__(self, root: Path, before: Callable[[FileEvent], object]) -> None:
        self._root, self._before, self._count = root, before, 0
        self._lock = threading.Lock()  # files are flushed in several threads
        self._inside = threading.local()  # set while `before` runs, whose own changes are no events

    def begin(self) -> None:
        serialize_file = safetensors.torch.serialize_file

        def write(tensors: Any, path: Any, *rest: Any, **options: Any) -> object:
            self._happens("write", [Path(path)], truncates=True)
            return serialize_file(tensors, path, *rest, **options)

        def sync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self._happens("sync folder" if path.is_dir() else "sync", [path])

        safetensors.torch.serialize_file = write
        os.fsync = os.fdatasync = sync
        sys.addaudithook(self._audited)

    def _audited(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = arguments
            if flags & _WRITING and not isinstance(path, int):
                self._happens("open", [_absolute(path, None)], truncates=bool(flags & os.O_TRUNC))
        elif name in _AUDITED:
            places = [(arguments[at], None if folder is None else arguments[folder]) for at, folder in _AUDITED[name]]
            self._happens(name.removeprefix("os."), [_absolute(path, folder) for path, folder in places])

    def _happens(self, kind: str, paths: list[Path], truncates: bool = False) -> None:
        if getattr(self._inside, "now", False) or not any(path.is_relative_to(self._root) for path in paths):
            return
        with self._lock:
            self._count += 1
            self._inside.now = True
            try:
                self._before(FileEvent(self._count, kind, tuple(paths), truncates))
            finally:
                self._inside.now = False


def _absolute(path: Any, folder: int | None) -> Path:
    """Return a path, which may be relative to the directory of a descriptor (-1: none), without resolving its name.

    An open file may be given by its descriptor.
    """
    if isinstance(path, int):
        return Path(f"/proc/self/fd/{path}").readlink()
    below = Path.cwd() if folder is None or folder < 0 else Path(f"/proc/self/fd/{folder}").readlink()
    joined = below / os.fsdecode(path)
    return joined.parent.resolve() / joined.name
