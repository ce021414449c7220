"""Reading rows of text: from local files, from folders of files, or through the library `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fed.config import RunConfig
from fed.config.data import DataConfig
from fed.data.hf_datasets import load, read_table
from fed.errors import FedError

Row = dict[str, Any]

_TABULAR = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_KINDS = (".jsonl", *_TABULAR)
# The data sets' names on the Hugging Face hub.
_HUB = {
    "glue": "nyu-mll/glue",
    "dolly": "databricks/databricks-dolly-15k",
    "natural-instructions": "Muennighoff/natural-instructions",
}
# The column names of published instruction data sets, and the names used for them here.
_RENAMED = {
    "dolly": {"context": "input", "response": "output"},
    "natural-instructions": {"definition": "instruction", "inputs": "input", "targets": "output", "task_name": "task"},
}


@dataclass(frozen=True)
class Rows:
    """Rows as they were read, each with its place (such as file and line), which error messages name.

    The rows from `first_test` on are the source's own test rows; it is None if there are none. `label_names` are the
    names of labels that the rows hold as numbers, by number.
    """

    rows: Sequence[Row]
    places: Sequence[str]
    first_test: int | None = None
    label_names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, key: str, name: str, kinds: tuple[type, ...] = (str,), empty: bool = False) -> list[Any]:
        """Return the values of the column `name`, which the configuration's `key` names.

        With `empty` values may be missing, and are then None. Raises FedError, naming the first such row, if a value is
        missing or not of one of the types `kinds`.
        """
        wanted = " or ".join({str: "a string", int: "an integer", list: "a list"}[kind] for kind in kinds)
        values = []
        for row, place in zip(self.rows, self.places, strict=True):
            if name not in row and not empty:
                raise FedError(f"{place}: {key} is {name!r}; the columns there are {', '.join(row)}")
            value = row.get(name)
            if not isinstance(value, kinds) and not (empty and value is None):
                raise FedError(f"{place}: {key} {name!r} holds {value!r:.40}; it should be {wanted}")
            values.append(value)
        return values


def read(config: RunConfig) -> Rows:
    """Return the rows of the source that a configuration names; raise FedError if they cannot be read."""
    data = config.data
    if data.name == "files":
        rows = read_local(data.path or "", "data.path")
        if data.test_path is None:
            return rows
        test = read_local(data.test_path, "data.test_path")
        return Rows([*rows.rows, *test.rows], [*rows.places, *test.places], first_test=len(rows))
    if data.name in _RENAMED and data.path is not None and Path(data.path).exists():
        return _renamed(read_local(data.path, "data.path", stem="task", asked=data.tasks), data.name)
    return _from_library(data)


def read_jsonl(path: Path, key: str) -> Rows:
    """Return the rows of a JSONL file, skipping blank lines; raise FedError, naming the line, if one is no object."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FedError(f"{key} is {str(path)!r}: cannot read it as UTF-8 text: {error}") from None
    rows, places = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_object(line, f"{path} line {number}"))
            places.append(f"{path} line {number}")
    if not rows:
        raise FedError(f"{key} is {str(path)!r}: the file holds no rows")
    return Rows(rows, places)


def _object(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FedError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise FedError(f"{place}: holds {row!r:.40}; every line should be a JSON object")
    return row


def read_local(
    name: str, key: str, stem: str = "file", asked: Sequence[str] = (), left_out: Sequence[str] = ()
) -> Rows:
    """Return the rows of a file, or of all files in a folder.

    For a folder the column `stem` is added, which holds the name of the row's file without suffix; only files named in
    `asked` are read, if it is not empty, and files named in `left_out` are not. Raises FedError, with `key` as the name
    of the setting, if the rows cannot be read.
    """
    path = Path(name)
    if not path.exists():
        raise FedError(f"{key} is {name!r}: there is no such file")
    if not path.is_dir():
        return _file(path, key)
    files = sorted(file for file in path.iterdir() if file.suffix in _KINDS)
    if not files:
        raise FedError(f"{key} is {name!r}: the folder holds no {', '.join(_KINDS)} file")
    stems = [file.stem for file in files]
    chosen = set(_of_tasks(stems, asked) if asked else range(len(files))) - set(_of_tasks(stems, left_out, "--without"))
    if not chosen:
        raise FedError(f"{key} is {name!r}: no file is left of {_some(stems)}")
    files = [files[index] for index in sorted(chosen)]
    found = [(file.stem, _file(file, key)) for file in files]
    rows = [{stem: part, **row} for part, piece in found for row in piece.rows]
    return Rows(rows, [place for _, piece in found for place in piece.places])


def _file(path: Path, key: str) -> Rows:
    if path.suffix not in _TABULAR:
        return read_jsonl(path, key)
    rows = read_table(path, _TABULAR[path.suffix], key)
    return Rows(rows, _rows_of(str(path), rows))


def _renamed(rows: Rows, name: str) -> Rows:
    """Return the rows with the columns of a published data set renamed; other columns keep their names."""
    names = _RENAMED[name]
    renamed = [{names.get(column, column): value for column, value in row.items()} for row in rows.rows]
    return replace(rows, rows=renamed)


def _of_tasks(names: Sequence[str], asked: Sequence[str], key: str = "data.tasks") -> list[int]:
    """Return the indices of the names that match a task in `asked`; raise FedError if a task matches no name."""
    found = sorted(set(names))
    for task in asked:
        if not any(_is_task(name, task) for name in found):
            raise FedError(f"{key} names {task!r}; there are {_some(found)}")
    wanted = {name for name in found if any(_is_task(name, task) for task in asked)}
    return [index for index, name in enumerate(names) if name in wanted]


def _is_task(name: str, asked: str) -> bool:
    """Return whether `asked` is a task's full name or its number, as "task1058" is for "task1058_linguistics…"."""
    return name == asked or name.startswith(f"{asked}_")


def _some(names: Iterable[str]) -> str:
    first, rest = (names := list(names))[:10], names[10:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


def _from_library(data: DataConfig) -> Rows:
    """Return the rows of a data set on the hub, or of a local copy, loaded by the library `datasets`."""
    name = data.path or _HUB[data.name]
    choose = (lambda columns: _of_tasks(columns["task_name"], data.tasks)) if data.tasks else None
    found, names = load(data, name, data.split, choose)
    test = [] if data.test_split is None else load(data, name, data.test_split, choose)[0]
    places = [*_rows_of(f"{name} {data.split}", found), *_rows_of(f"{name} {data.test_split}", test)]
    rows = Rows([*found, *test], places, len(found) if test else None, names)
    return _renamed(rows, data.name) if data.name in _RENAMED else rows


def _rows_of(source: str, rows: Sequence[Row]) -> list[str]:
    return [f"{source} row {number}" for number in range(1, len(rows) + 1)]
