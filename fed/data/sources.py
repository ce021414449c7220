"""Reading rows of text: from local files, from folders of files, or through the library `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fed.config import RunConfig
from fed.config.data import DataConfig
from fed.data.csv_files import read_csv
from fed.data.hf_datasets import load, read_parquet
from fed.data.json_files import mend_text, read_json, read_jsonl
from fed.data.rows import Row, Rows, joined, some_of
from fed.data.tokenization import Stage
from fed.errors import FedError

# What reads files of each suffix; others, given by name, are read as JSONL.
_READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
# Files that the library `datasets` and the hub write beside the rows of a data set; they hold none.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
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


def read(config: RunConfig, stage: Stage | None = None) -> Rows:
    """Return the rows of the source that a configuration names; raise FedError if they cannot be read.

    `stage` shows the progress of large files.
    """
    data = config.data
    if data.name == "files":
        rows = read_local(data.path or "", "data.path", stage=stage)
        if data.test_path is None:
            return rows
        _require_apart(data.path or "", data.test_path)
        test = read_local(data.test_path, "data.test_path", stage=stage)
        return replace(joined([rows, test]), first_test=len(rows))
    if data.name in _RENAMED and data.path is not None and Path(data.path).exists():
        return _of_published(data, stage)
    return _from_library(data)


def _require_apart(path: str, test_path: str) -> None:
    """Raise FedError if a file holds both training and test rows, by whatever names."""
    trained = {_identity(file): file for file in _files(path, "data.path") if file.exists()}
    for file in _files(test_path, "data.test_path"):
        if file.exists() and (other := trained.get(_identity(file))) is not None:
            raise FedError(
                f"data.test_path is {test_path!r}: {str(file)!r} is the same file as {str(other)!r} of data.path, so "
                "the test rows would be trained on; another file, or data.test_fraction instead, would be right"
            )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _of_published(data: DataConfig, stage: Stage | None) -> Rows:
    """Return the rows of a local copy of a published data set: a folder of files, one for each task, or one file.

    Only the rows of `data.tasks` are returned. In a file they go by the column `task`, or else by the file's name.
    """
    path = Path(data.path or "")
    rows = _renamed(read_local(str(path), "data.path", stem="task", asked=data.tasks, stage=stage), data.name)
    if not data.tasks or path.is_dir():
        return rows
    rows = replace(rows, rows=[{"task": mend_text(path.stem), **row} for row in rows.rows])
    return rows.take(_of_tasks(rows.column("data.tasks", "task"), data.tasks))


def read_local(
    name: str,
    key: str,
    stem: str = "file",
    asked: Sequence[str] = (),
    left_out: Sequence[str] = (),
    stage: Stage | None = None,
) -> Rows:
    """Return the rows of a file, or of all files in a folder.

    For a folder the column `stem` is added, which holds the name of the row's file without suffix; only files named in
    `asked` are read, if it is not empty, and files named in `left_out` are not, nor hidden files, such as those that
    macOS writes beside others, nor those in which the library `datasets` describes a data set. Raises FedError, with
    `key` as the name of the setting, if the rows cannot be read.
    """
    files = _files(name, key)
    if not Path(name).is_dir():
        return _file(files[0], key, stage)
    stems = [mend_text(file.stem) for file in files]
    chosen = set(_of_tasks(stems, asked) if asked else range(len(files))) - set(_of_tasks(stems, left_out, "--without"))
    if not chosen:
        raise FedError(f"{key} is {name!r}: no file is left of {some_of(stems)}")
    found = [(stems[index], _file(files[index], key, stage)) for index in sorted(chosen)]
    return joined(replace(piece, rows=[{stem: part, **row} for row in piece.rows]) for part, piece in found)


def _files(name: str, key: str) -> list[Path]:
    """Return a file, or the files of rows in a folder, sorted; raise FedError if there is none."""
    path = Path(name)
    try:
        if not path.exists():
            raise FedError(f"{key} is {name!r}: there is no such file")
        if not path.is_dir():
            return [path]
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READERS and not _is_beside(file.name))
    except OSError as error:
        raise FedError(f"{key} is {name!r}: it cannot be read: {error.strerror}") from None
    if not files:
        raise FedError(f"{key} is {name!r}: the folder holds no {', '.join(_READERS)} file")
    return files


def _is_beside(name: str) -> bool:
    return name.startswith(".") or name in _METADATA


def _file(path: Path, key: str, stage: Stage | None) -> Rows:
    if not path.exists():
        raise FedError(f"{key} is {str(path)!r}: it is a link to a file that does not exist")
    if not path.is_file():  # reading a named pipe or a device might never end
        raise FedError(f"{key} is {str(path)!r}: it is no regular file; rows are read from files alone")
    return _READERS.get(path.suffix.lower(), read_jsonl)(path, key, stage)


def _renamed(rows: Rows, name: str) -> Rows:
    """Return the rows with the columns of a published data set renamed; other columns keep their names.

    Raises FedError if a row has a column under both names, because one would be lost.
    """
    names = _RENAMED[name]
    renamed = [{names.get(column, column): value for column, value in row.items()} for row in rows.rows]
    for row, new, place in zip(rows.rows, renamed, rows.places, strict=True):
        if len(new) < len(row):
            old = next(column for column in names if column in row and names[column] in row)
            raise FedError(f"{place}: {old!r} is read as {names[old]!r} of {name}, but there is such a column as well")
    return replace(rows, rows=renamed)


def _of_tasks(names: Sequence[str], asked: Sequence[str], key: str = "data.tasks") -> list[int]:
    """Return the indices of the names that match a task in `asked`; raise FedError if a task matches no name."""
    found = sorted(set(names))
    for task in asked:
        if not any(_is_task(name, task) for name in found):
            raise FedError(f"{key} names {task!r}; there are {some_of(found)}")
    wanted = {name for name in found if any(_is_task(name, task) for task in asked)}
    return [index for index, name in enumerate(names) if name in wanted]


def _is_task(name: str, asked: str) -> bool:
    """Return whether `asked` is a task's full name or its number, as "task1058" is for "task1058_linguistics…"."""
    return name == asked or name.startswith(f"{asked}_")


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
