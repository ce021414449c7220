"""What is left of a folder after a power loss: what was flushed to the disk is there, of all else any part may be.

A file's content is on the disk once the file was flushed, a name once its folder was. The files and folders of a
recording are known by their inodes, which are held open so that the system gives none of their numbers out again.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.file_events import FileEvent, watch

# A folder's contents by relative path: None for a folder, a text for a symbolic link, bytes for a file.
Image = dict[str, bytes | str | None]


@dataclass(frozen=True)
class Loss:
    """A power loss before an event: what the disk may hold, by adversary, and how much had been told by then."""

    event: str
    told: int
    images: dict[str, Image]


class Recorder:
    """Records what a power loss before each change below `root` would leave; all that is there now is on the disk.

    The adversaries: "flushed" leaves nothing that was not flushed. "names" leaves every name, and of content that was
    not flushed nothing, a half, or zeros. "mixed" leaves any of the names that were not flushed, with any such content.
    """

    def __init__(self, root: Path) -> None:
        self.losses: list[Loss] = []
        self.told = -1
        self._root = root.resolve()
        self._contents: dict[int, bytes | str] = {}  # what was flushed, by inode
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}  # by folder: each name's inode, and if it is a folder
        self._held: set[int] = set()
        for folder, folders, files in os.walk(self._root):
            self._flush_folder(Path(folder))
            for name in files + folders:
                self._flush_content(Path(folder, name))

    def begin(self) -> None:
        """Record all changes of this process from now on."""
        watch(self._root, self._before)

    def _before(self, event: FileEvent) -> None:
        self.note(str(event))
        if event.kind == "sync":
            self._flush_content(event.paths[0])
        elif event.kind == "sync folder":
            self._flush_folder(event.paths[0])

    def note(self, event: str) -> None:
        """Record what a power loss would leave now."""
        draw = random.Random(len(self.losses))
        images = {"flushed": self._flushed(), "names": self._named(draw), "mixed": self._mixed(draw)}
        self.losses.append(Loss(event, self.told, images))

    def _flush_content(self, path: Path) -> None:
        if path.is_symlink():
            self._contents[path.lstat().st_ino] = str(path.readlink())
        elif path.is_file():
            self._contents[self._hold(path)] = path.read_bytes()

    def _flush_folder(self, path: Path) -> None:
        names = {}
        for entry in os.scandir(path):
            is_folder = entry.is_dir(follow_symlinks=False)
            names[entry.name] = (self._hold(Path(entry.path)), is_folder)
            if entry.is_symlink():
                self._flush_content(Path(entry.path))  # a link's target is written with its name
        self._names[self._hold(path)] = names

    def _hold(self, path: Path) -> int:
        number = path.lstat().st_ino
        if number not in self._held:
            os.open(path, (os.O_PATH if path.is_symlink() else os.O_RDONLY) | os.O_NOFOLLOW)
            self._held.add(number)
        return number

    def _flushed(self) -> Image:
        image: Image = {}

        def visit(folder: int, prefix: str) -> None:
            for name, (number, is_folder) in self._names.get(folder, {}).items():
                image[prefix + name] = None if is_folder else self._contents.get(number, b"")
                if is_folder:
                    visit(number, f"{prefix}{name}/")

        visit(self._root.stat().st_ino, "")
        return image

    def _named(self, draw: random.Random) -> Image:
        found = sorted(self._root.rglob("*"))
        return {str(path.relative_to(self._root)): self._partly(path, draw) for path in found}

    def _mixed(self, draw: random.Random) -> Image:
        image: Image = {}

        def visit(folder: int, path: Path | None, prefix: str) -> None:
            flushed = self._names.get(folder, {})
            there = {} if path is None else {each.name: each for each in path.iterdir()}
            for name in sorted(flushed.keys() | there.keys()):
                number, is_folder = flushed.get(name, (-1, False))
                own = there.get(name)
                same = own is not None and own.lstat().st_ino == number
                if not same and draw.random() < 0.5:  # the newer state of this name: another file, or none
                    if own is None:
                        continue
                    number, is_folder = own.lstat().st_ino, stat.S_ISDIR(own.lstat().st_mode)
                    same = True
                elif number < 0:
                    continue
                if is_folder:
                    image[prefix + name] = None
                    visit(number, own if same else None, f"{prefix}{name}/")
                elif same and own is not None:
                    image[prefix + name] = self._partly(own, draw)
                else:
                    image[prefix + name] = self._contents.get(number, b"")

        visit(self._root.stat().st_ino, self._root, "")
        return image

    def _partly(self, path: Path, draw: random.Random) -> bytes | str | None:
        """Return what was flushed of a file and, of what was not, nothing, a half, zeros, or all."""
        if path.is_symlink():
            return str(path.readlink())
        if path.is_dir():
            return None
        content, flushed = path.read_bytes(), self._contents.get(path.stat().st_ino, b"")
        assert isinstance(flushed, bytes)
        if not content.startswith(flushed):
            flushed = b""  # written anew in place: the old content is gone
        rest = content[len(flushed) :]
        return flushed + draw.choice([b"", rest[: len(rest) // 2], bytes(len(rest)), rest])


def lay_out(image: Image, root: Path) -> None:
    """Make a folder with an image's contents."""
    root.mkdir(parents=True)
    for name, content in sorted(image.items()):
        path = root / name
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


def distinct(losses: Iterable[Loss]) -> list[tuple[str, int, Image]]:
    """Return each image that differs, with the adversary and the last event that it is of, and what was told then."""
    found: dict[tuple[str, int], tuple[str, int, Image]] = {}
    for loss in losses:
        for adversary, image in loss.images.items():
            found[adversary, hash(tuple(sorted(image.items(), key=lambda item: item[0])))] = (
                f"power lost at {loss.event} ({adversary})",
                loss.told,
                image,
            )
    return list(found.values())
