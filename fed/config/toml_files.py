"""Reading TOML of any origin: what no configuration holds is refused before it takes time or memory."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from datetime import date, time
from pathlib import Path
from typing import Any

from fed.errors import FedError
from fed.files import read_text

_MOST_BYTES = 1_000_000  # the settings of 10,000 clients take a tenth of that
_MOST_WRITTEN = 10 * _MOST_BYTES  # by this program: the same values with each on a line of its own
_DEEPEST = 10  # tables and lists within each other
_LARGEST = 2**63 - 1  # of an integer in TOML
# Many names joined by dots, for which tomllib takes the square of their number: it is asked of no valid key.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){50}""")
_SHOWN = 100  # characters of a value


def read_toml(path: Path, written: bool = False) -> dict[str, Any]:
    """Return the content of a TOML file; see `read_toml_text` and `parse_toml` for what is raised."""
    return parse_toml(read_toml_text(path, written), str(path))


def read_toml_text(path: Path, written: bool = False) -> str:
    """Return the text of a TOML file, which may be larger if this program has `written` it.

    Raises FileNotFoundError if there is none, and FedError if it is no regular file, too large, or not UTF-8.
    """
    try:
        if not path.exists():
            raise FileNotFoundError(path)
        if not path.is_file():  # reading a named pipe or a device might never end
            raise FedError(f"cannot read {path} as a TOML file: it is no regular file")
        most = _MOST_WRITTEN if written else _MOST_BYTES
        if (size := path.stat().st_size) > most:
            raise FedError(f"{path} is no configuration: it has {size} bytes, and one has at most {most}")
        return read_text(path)
    except (FileNotFoundError, FedError):
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FedError(f"cannot read {path} as a TOML file: {reason}") from None


def parse_toml(text: str, what: str) -> dict[str, Any]:
    """Return the content of a TOML text; raise FedError, naming `what`, if it is not TOML or nests too deeply."""
    try:
        return _parse(text, what)
    except tomllib.TOMLDecodeError as error:
        raise FedError(f"{what} is not TOML: {error}") from None


def parse_toml_or_none(text: str, what: str) -> dict[str, Any] | None:
    """Return the content of a TOML text, or None if it is not TOML; raise FedError if it nests too deeply."""
    try:
        return _parse(text, what)
    except tomllib.TOMLDecodeError:
        return None


def _parse(text: str, what: str) -> dict[str, Any]:
    if _LONG_KEY.search(text):
        raise FedError(f"{what} joins 50 names or more by dots; no key is as deep")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise FedError(f"{what} nests lists or tables too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # of Python: an integer of thousands of digits, or a date that is none
        reason = "an integer beyond 64 bits" if "digits" in str(error) else f"a value that is none: {error}"
        raise FedError(f"{what} holds {reason}") from None


def check_values(table: dict[str, Any], where: str) -> None:
    """Raise FedError, naming the first key, if a value cannot stand in a configuration whatever its key.

    Such are integers beyond 64 bits, dates, texts with characters that no file holds, and values that nest too deeply.
    """
    for key, value, depth in _walk(table):
        name = key if len(key) <= _SHOWN and key.isprintable() else shown(key)
        if depth > _DEEPEST:
            raise FedError(f"{where}: {name} is nested too deeply: at most {_DEEPEST} lists or tables may nest")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise FedError(f"{where}: {name} is an integer beyond 64 bits; a smaller one would be right")
        if isinstance(value, date | time):
            raise FedError(f"{where}: {name} is {value}, a date or a time; in quotation marks it would be text")
        if isinstance(value, str) and (bad := bad_character(value)):
            raise FedError(f"{where}: {name} is {shown(value)}: it holds {bad}, which it should not")
        if bad := bad_character(key):
            raise FedError(f"{where}: the key {name} holds {bad}, which it should not")


def bad_character(text: str) -> str:
    """Return what a text holds that no file of text does, as words, or "" if there is nothing."""
    if "\0" in text:
        return "a NUL character"
    return "half a surrogate pair" if re.search("[\ud800-\udfff]", text) else ""


def _walk(table: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Yield the dotted key, the value and the depth of everything in a table; what is too deep is not looked into."""
    left: list[tuple[str, Any, int]] = [(str(key), value, 1) for key, value in reversed(table.items())]
    while left:
        key, value, depth = left.pop()
        yield key, value, depth
        if isinstance(value, dict):
            left.extend((f"{key}.{name}", inner, depth + 1) for name, inner in reversed(value.items()))
        elif isinstance(value, list | tuple):
            left.extend((key, inner, depth + 1) for inner in reversed(value))


def shown(value: object) -> str:
    """Return a value for a message, as `repr` writes it, shortened if it is long.

    >>> shown([1, "a"]), len(shown("x" * 1000))
    ("[1, 'a']", 101)
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of more than 4,300 digits
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
