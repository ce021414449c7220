"""`rounds.jsonl`: a run's rows, one a line, appended at the end of each round and read back.

A seal is the size and the digest of the file after a round. Checkpoints and finished runs hold it, so that rows that
were lost, doubled, exchanged or changed are noticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

from fed import config as configuration
from fed.errors import FedError
from fed.files import digest, naming, new_digest, sync, write_atomically
from fed.types import Row

ROUNDS = "rounds.jsonl"
_REQUIRED = ("round", "accuracy")
_TEXTS = ("faults",)  # lists of texts; all other values are numbers, or lists of them


class RowSeal(NamedTuple):
    """The first `size_bytes` bytes of `rounds.jsonl` have this digest."""

    size_bytes: int
    digest: str


class RowFile:
    """A run's `rounds.jsonl`, open for appending; every row is flushed to the disk before `append` returns."""

    def __init__(self, directory: Path, kept: bytes = b"") -> None:
        """Open the file; it holds the lines `kept` and nothing else from then on."""
        self._path = directory / ROUNDS
        if not self._path.is_file() or self._path.read_bytes() != kept:
            write_atomically(self._path, kept)
        self._file = self._path.open("ab")
        self._size, self._digest = len(kept), new_digest(kept)

    def append(self, row: Row) -> None:
        """Append a row to the file."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with naming(self._path):
            self._file.write(line)
            self._file.flush()
            sync([self._path])
        self._size += len(line)
        self._digest.update(line)

    @property
    def seal(self) -> RowSeal:
        """The seal of the rows so far."""
        return RowSeal(self._size, self._digest.hexdigest())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def complete_lines(directory: Path) -> bytes:
    """Return the content of `rounds.jsonl` without an incomplete last line; nothing if the file does not exist."""
    try:
        content = (directory / ROUNDS).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise FedError(f"{str(directory / ROUNDS)!r} cannot be read: {error.strerror}") from None
    return content[: content.rfind(b"\n") + 1]


def sealed_lines(directory: Path, seal: RowSeal) -> bytes:
    """Return the lines that a seal is of; raise FedError if the file begins with others."""
    content = complete_lines(directory)[: seal.size_bytes]
    if len(content) != seal.size_bytes or digest(content) != seal.digest:
        raise FedError(
            f"{str(directory / ROUNDS)!r} is damaged: its rows are not those that the run wrote; put back the file, "
            "or resume the run, which goes on from a checkpoint before the damage if there is one"
        )
    return content


def first_lines(directory: Path, count: int) -> bytes:
    """Return the first `count` lines; raise FedError if there are fewer."""
    lines = complete_lines(directory).split(b"\n")[:-1]
    if len(lines) < count:
        raise FedError(f"{str(directory / ROUNDS)!r} is damaged: it holds {len(lines)} of {count} rows")
    return b"".join(line + b"\n" for line in lines[:count])


def parse_rows(directory: Path, content: bytes) -> list[Row]:
    """Return lines of `rounds.jsonl` as rows; keys that earlier versions named otherwise are renamed.

    Raises FedError, naming the line, unless they are the rows of rounds 0, 1, 2, …
    """
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1]):
        try:
            row = json.loads(line, parse_constant=_no_number)
            if fault := _fault(row, number):
                raise ValueError(fault)
        except (ValueError, RecursionError) as error:
            raise FedError(f"{str(directory / ROUNDS)!r} is damaged: line {number + 1}: {error}") from None
        rows.append(cast("Row", configuration.renamed(row)))
    return rows


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _fault(row: Any, number: int) -> str | None:
    """Return why a line is not the row of round `number`, or None if it is."""
    if not isinstance(row, dict):
        return "it holds no JSON object"
    for key in _REQUIRED:
        if key not in row or not (_is_number(row[key]) or (key == "accuracy" and row[key] is None)):
            return f"{key!r} is missing or no number"
    if row["round"] != number or not isinstance(row["round"], int):
        return f"round {number} belongs there, and it holds round {row['round']!r}"
    for key, value in row.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        if key in _TEXTS:
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                return f"{key!r} holds {value!r:.40}, no list of texts"
            continue
        if not all(map(_is_number, values)):
            return f"{key!r} holds {value!r:.40}, no number"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
