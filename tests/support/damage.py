"""Ways to damage the files of a run: what disks, interrupted copies and mistaken hands do to them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Damage:
    """A change to files below a directory: the file's name there, what is done to it, and the function that does it."""

    name: str
    kind: str
    apply: Callable[[Path], object]

    def __str__(self) -> str:
        return f"{self.name} {self.kind}"


def damages(directory: Path, other: Path, flips: int = 3) -> list[Damage]:
    """Return damages to every file below `directory`, not to symbolic links; `other` is another run's directory."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink()]
    names = [str(path.relative_to(directory)) for path in files if path.name != ".lock"]
    found: list[Damage] = []
    for name in names:
        content = (directory / name).read_bytes()
        found += _of_content(name, content, flips)
        found += _exchanges(name, names, directory)
        if (other / name).is_file() and (other / name).read_bytes() != content:
            found.append(Damage(name, "of another run", _replaced(name, (other / name).read_bytes())))
        if name.endswith(".jsonl"):
            found += _of_rows(name, content.splitlines(keepends=True))
    return found + list(_of_folders(directory, other))


def _of_content(name: str, content: bytes, flips: int) -> list[Damage]:
    draw = random.Random(name)
    changed = {f"bit {bit} flipped": _flipped(content, bit) for bit in draw.sample(range(8 * len(content)), flips)}
    changed |= {
        "cut by a byte": content[:-1],
        "cut in half": content[: len(content) // 2],
        "emptied": b"",
        "doubled": content * 2,
        "zeroed": bytes(len(content)),
        "zeroed at its end": content[: -len(content) // 4] + bytes(len(content) - len(content[: -len(content) // 4])),
    }
    made = [Damage(name, kind, _replaced(name, new)) for kind, new in changed.items()]
    return [*made, Damage(name, "deleted", lambda folder: (folder / name).unlink())]


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _exchanges(name: str, names: list[str], directory: Path) -> Iterator[Damage]:
    """Exchanges of the file with each later one of the same kind: of another round, client or checkpoint."""

    def kind(name: str) -> str:
        return "".join(letter for letter in name if not letter.isdigit())

    for other in names:
        if other > name and kind(other) == kind(name):
            one, two = (directory / name).read_bytes(), (directory / other).read_bytes()

            def exchange(folder: Path, other: str = other, one: bytes = one, two: bytes = two) -> None:
                (folder / name).write_bytes(two)
                (folder / other).write_bytes(one)

            if one != two:
                yield Damage(name, f"exchanged with {other}", exchange)
                yield Damage(name, f"a copy of {other}", _replaced(name, two))


def _of_rows(name: str, lines: list[bytes]) -> Iterator[Damage]:
    changed = {
        "without its last row": lines[:-1],
        "without its first row": lines[1:],
        "without a row": lines[:1] + lines[2:],
        "with a row twice": [*lines[:2], *lines[1:]],
        "with its last row twice": [*lines, lines[-1]],
        "with two rows swapped": [lines[0], lines[2], lines[1], *lines[3:]],
        "with two rows' ends joined": [lines[0][:-1] + lines[1], *lines[2:]],
        "with a digit changed": [lines[0], lines[1].replace(b'"accuracy": 0.', b'"accuracy": 0.1', 1), *lines[2:]],
        "with an empty line": [lines[0], b"\n", *lines[1:]],
        "with a row that is no JSON": [lines[0], b"nonsense\n", *lines[2:]],
        "with a row that is no object": [lines[0], b"[1, 2]\n", *lines[2:]],
        "with a row begun": [*lines, lines[-1][:20]],
    }
    for kind, rows in changed.items():
        yield Damage(name, kind, _replaced(name, b"".join(rows)))


def _of_folders(directory: Path, other: Path) -> Iterator[Damage]:
    """Folders deleted, emptied, or put in the place of one another."""
    folders = [path for path in sorted(directory.rglob("*")) if path.is_dir() and not path.is_symlink()]
    for path in folders:
        name = str(path.relative_to(directory))
        yield Damage(name, "deleted", lambda folder, name=name: shutil.rmtree(folder / name))

        def empty(folder: Path, name: str = name) -> None:
            shutil.rmtree(folder / name)
            (folder / name).mkdir()

        yield Damage(name, "emptied", empty)
        if (other / name).is_dir():

            def exchange(folder: Path, name: str = name) -> None:
                shutil.rmtree(folder / name)
                shutil.copytree(other / name, folder / name, symlinks=True)

            yield Damage(name, "of another run", exchange)
    rounds = sorted(path.name for path in directory.glob("checkpoint/round-*"))
    for name in rounds:
        later = f"checkpoint/round-{int(name.removeprefix('round-')) + 1}"

        def rename(folder: Path, name: str = name, later: str = later) -> None:
            shutil.rmtree(folder / later, ignore_errors=True)
            (folder / "checkpoint" / name).rename(folder / later)

        yield Damage(f"checkpoint/{name}", f"renamed to {later}", rename)
