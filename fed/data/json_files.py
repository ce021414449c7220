"""Reading JSON: a row a line (JSONL), a list of rows, columns, or a task file of Natural Instructions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fed.data.rows import Row, Rows
from fed.data.text_lines import BYTE_ORDER_MARK, megabytes, read_lines, unreadable
from fed.data.tokenization import Stage
from fed.errors import FedError
from fed.files import read_text

# Half a surrogate pair is no character, and UTF-8 has no bytes for it; JSON may name one by an escape such as \ud83d.
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def read_jsonl(path: Path, key: str, stage: Stage | None = None) -> Rows:
    """Return the rows of a JSONL file, skipping blank lines; raise FedError, naming the line, if one is no object.

    Halves of surrogate pairs become U+FFFD; `mended` of what is returned has the places.
    """
    rows, places, mended = [], [], []
    with closing(read_lines(path, key, stage)) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(BYTE_ORDER_MARK)  # files with such a mark may have been joined
            if not text.strip():
                continue
            place = f"{path} line {number}"
            row = _parse(text, place)
            if not isinstance(row, dict):
                raise FedError(f"{place}: holds {row!r:.40}; every line should be a JSON object")
            if _HALF_ESCAPED.search(text) and (whole := _mended(row, place)) != row:
                row = whole
                mended.append(place)
            rows.append(row)
            places.append(place)
    return _filled(Rows(rows, places, mended=mended), path, key)


def read_json(path: Path, key: str, stage: Stage | None = None) -> Rows:
    """Return the rows of a JSON file; raise FedError if it cannot be read, naming the row if one is no object.

    The file may hold a list of objects, each a row; an object of columns, which are lists of equal length or, as pandas
    writes them, objects with the same keys; one row; JSONL; or a task of Natural Instructions, as
    github.com/allenai/natural-instructions publishes them (`_task_rows`). Halves of surrogate pairs become U+FFFD.
    """
    if _is_jsonl(path, key):
        return read_jsonl(path, key, stage)
    with megabytes(path, stage) as advance:
        try:
            text = read_text(path)
        except (OSError, ValueError) as error:
            raise unreadable(path, key, error) from None
        found = _rows(_parse(text, str(path)), path) if text.strip() else []
        advance(len(text))
    places = [f"{path} row {number}" for number in range(1, len(found) + 1)]
    for place, row in zip(places, found, strict=True):
        if not isinstance(row, dict):
            raise FedError(f"{place}: holds {row!r:.40}; every row should be a JSON object")
    whole, mended = found, []
    if _HALF_ESCAPED.search(text):
        whole = [_mended(row, place) for row, place in zip(found, places, strict=True)]
        mended = [place for place, before, after in zip(places, found, whole, strict=True) if before != after]
    return _filled(Rows(whole, places, mended=mended), path, key)


def _is_jsonl(path: Path, key: str) -> bool:
    """Return whether the first line that is not blank is a JSON object, and other such lines follow it."""
    with closing(read_lines(path, key, None)) as lines:
        filled = (line for line in lines if line.strip())
        first = next(filled, "")
        if not first.lstrip().startswith("{") or next(filled, None) is None:
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return False
        return True


def _filled(rows: Rows, path: Path, key: str) -> Rows:
    if not rows:
        raise FedError(f"{key} is {str(path)!r}: the file holds no rows")
    return rows


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise FedError(f"{place}: not JSON: {error.msg} at {line}column {error.colno}") from None
    except FedError as error:
        raise FedError(f"{place}: {error}") from None
    except ValueError:
        raise FedError(f"{place}: an integer has too many digits") from None
    except RecursionError:
        raise _nested_too_deeply(place) from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return the object; raise FedError if two values have the same key, because one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise FedError(f"{twice!r} is there twice in the object {found!r:.60}; keys should differ")
    return found


def mend_text(text: str) -> str:
    """Return a text with every half of a surrogate pair replaced by U+FFFD."""
    return _HALF.sub(_REPLACEMENT, text)


def _mended(row: Row, place: str) -> Row:
    """Return a row without halves of surrogate pairs; raise FedError if it is nested too deeply for that."""
    try:
        whole: Row = _mend(row, place)
    except RecursionError:
        raise _nested_too_deeply(place) from None
    return whole


def _nested_too_deeply(place: str) -> FedError:
    return FedError(f"{place}: lists or objects are nested too deeply")


def _mend(value: Any, place: str) -> Any:
    """Return a JSON value with every half of a surrogate pair, in strings and keys, replaced by U+FFFD."""
    if isinstance(value, str):
        return mend_text(value)
    if isinstance(value, list):
        return [_mend(item, place) for item in value]
    if isinstance(value, dict):
        mended = {mend_text(key): _mend(item, place) for key, item in value.items()}
        if len(mended) < len(value):
            raise FedError(f"{place}: keys that differ only in halves of surrogate pairs; they should differ otherwise")
        return mended
    return value


def _rows(found: Any, path: Path) -> list[Any]:
    """Return the rows that a file's JSON value holds; a row in a list may be any value still."""
    if isinstance(found, list):
        return found
    if not isinstance(found, dict):
        raise FedError(f"{path}: holds {found!r:.40}; it should be a list of rows")
    if {"Definition", "Instances"} <= found.keys():
        return _task_rows(found, path)
    for name, value in found.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            raise FedError(f"{path}: holds an object, whose {name!r} seems to be the rows; it should be a list of rows")
    columns = list(found.values())
    if columns and all(isinstance(column, list) for column in columns):
        return _transposed(found, [range(len(column)) for column in columns], path)
    if columns and all(isinstance(column, dict) for column in columns):
        return _transposed(found, [tuple(column) for column in columns], path)
    return [found] if found else []


def _transposed(columns: Mapping[str, Any], indices: Sequence[Sequence[Any]], path: Path) -> list[Row]:
    """Return the rows of columns, each of which has a value for each of its `indices`."""
    for name, own in zip(columns, indices, strict=True):
        if own != indices[0]:
            first = next(iter(columns))
            raise FedError(
                f"{path}: the columns {first!r} ({len(indices[0])} values) and {name!r} ({len(own)}) have not the same "
                "rows; they should, or the file be a list of rows"
            )
    return [{name: column[index] for name, column in columns.items()} for index in indices[0]]


def _task_rows(task: Mapping[str, Any], path: Path) -> list[Any]:
    """Return a row for each instance of a task: the task (the file's name), category, instruction, input and output.

    The instruction is the paragraphs of "Definition", each on lines of its own; `output` may be a list of answers.
    """
    definition, instances = task["Definition"], task["Instances"]
    paragraphs = [definition] if isinstance(definition, str) else definition
    if not isinstance(paragraphs, list) or not all(isinstance(part, str) for part in paragraphs):
        raise FedError(f"{path}: 'Definition' holds {definition!r:.40}; it should be a string or a list of strings")
    if not isinstance(instances, list):
        raise FedError(f"{path}: 'Instances' holds {instances!r:.40}; it should be a list of objects")
    shared: Row = {"task": path.stem}
    if isinstance(categories := task.get("Categories"), list):
        shared["category"] = ", ".join(map(str, categories))
    shared["instruction"] = "\n".join(paragraphs)
    return [{**shared, **row} if isinstance(row, dict) else row for row in instances]
