"""Reading through the libraries `datasets` and pyarrow, which only Parquet files and data sets of the hub need."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fed.config.data import DataConfig
from fed.data.rows import Row, Rows
from fed.data.text_lines import megabytes
from fed.data.tokenization import Stage
from fed.errors import FedError


def read_parquet(path: Path, key: str, stage: Stage | None = None) -> Rows:
    """Return the rows of a Parquet file with their types; values that are missing are None.

    `stage` shows the progress of a large file. Raises FedError, with `key` as the name of the setting, if the file
    cannot be read or two columns have the same name.
    """
    rows: list[Row] = []
    with _loading(f"{key} is {str(path)!r}: cannot read it as Parquet"), megabytes(path, stage) as advance:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise FedError(f"{path}: two columns are called {twice[0]!r}; their names should differ")
            bytes_per_row = path.stat().st_size // max(1, file.metadata.num_rows)
            for batch in file.iter_batches():
                try:
                    rows.extend(batch.to_pylist())
                except UnicodeDecodeError:
                    raise FedError(_where_no_text(batch, path, len(rows))) from None
                advance(bytes_per_row * len(batch))
    if not rows:
        raise FedError(f"{key} is {str(path)!r}: the file holds no rows")
    return Rows(rows, [f"{path} row {number}" for number in range(1, len(rows) + 1)])


def _where_no_text(batch: Any, path: Path, before: int) -> str:
    """Return which value of a batch, before which there are `before` rows, is declared to be text but is not UTF-8."""
    for number in range(len(batch)):
        for name in batch.schema.names:
            try:
                batch.column(name)[number].as_py()
            except UnicodeDecodeError as error:
                bad = error.object[error.start]
                return f"{path} row {before + number + 1}: {name!r} should be UTF-8 text; it holds byte 0x{bad:02x}"
    return f"{path}: a value should be UTF-8 text"


def load(
    data: DataConfig, name: str, split: str, choose: Callable[[Mapping[str, Any]], Sequence[int]] | None = None
) -> tuple[list[Row], Sequence[str] | None]:
    """Return the rows of a split, and the label names if the column `data.label` holds numbers that have names.

    `choose` returns the indices of the rows to load, given the columns; other rows are never loaded into memory.
    """
    subset = data.subset
    named = f"{name!r}{f' {subset!r}' if subset else ''}, split {split!r}"
    with _loading(f"data set {named} does not load") as datasets:
        found = _loaded(datasets, data, name, split)
        names: Sequence[str] | None = getattr(found.features.get(data.label), "names", None)
        if choose is not None:
            found = found.select(choose(found))
        rows: list[Row] = found.to_list()
    if not rows:
        raise FedError(f"data set {named} holds no rows")
    return rows, names


def _loaded(datasets: Any, data: DataConfig, name: str, split: str) -> Any:
    """Return a split as the library loads it, but columns of CSV and TSV files as the text that stands in them.

    Of such files the library would guess types, so that "007" is 7 and "NA" is missing, and would take quotation marks
    in a TSV file for those of fields. A column that the data set itself declares to hold labels keeps its type.
    """
    try:
        found = datasets.load_dataset(name, data.subset, split=split, revision=data.revision)
        if found.info.builder_name != "csv":
            return found
        features = found.features
    except datasets.exceptions.DatasetGenerationError:  # a guess that a later value contradicts, among other causes
        stream = datasets.load_dataset(name, data.subset, split=split, revision=data.revision, streaming=True)
        if stream.info.builder_name != "csv":
            raise
        features = dict.fromkeys(next(iter(stream)))
    builder = datasets.load_dataset_builder(name, data.subset, revision=data.revision)
    text = datasets.Value("string")
    return datasets.load_dataset(
        name,
        data.subset,
        split=split,
        revision=data.revision,
        features=datasets.Features(
            {column: kind if isinstance(kind, datasets.ClassLabel) else text for column, kind in features.items()}
        ),
        keep_default_na=False,
        na_values=[""],
        quoting=csv.QUOTE_NONE if builder.config.sep == "\t" else builder.config.quoting,
    )


@contextmanager
def _loading(what: str) -> Iterator[Any]:
    """Yield the library `datasets` with its progress bars and messages off; turn its exceptions into a FedError."""
    try:
        import datasets
    except ImportError:
        raise FedError("this data needs the library datasets: install plora-kernels[data]") from None
    hidden, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # The library's CSV reader leaves files to be closed by the garbage collector.
            warnings.simplefilter("ignore", ResourceWarning)
            yield datasets
    except FedError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n")[0] or type(cause).__name__
        raise FedError(f"{what}: {reason}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not hidden:
            datasets.enable_progress_bars()
