"""Reading through the libraries `datasets` and pyarrow, which only Parquet files and data sets of the hub need."""

from __future__ import annotations

import csv
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fed.config.data import DataConfig
from fed.data.csv_files import read_csv
from fed.data.rows import Row, Rows, joined
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
    """Return a split as the library loads it, but the columns of CSV and TSV files as the text that stands in them.

    Of such files the library would guess types, so that "007" is 7 and "NA" is missing, and would let a quotation mark
    swallow rows. If they need options that `read_csv` does not know, or the data set declares labels, the library reads
    them, told not to guess.
    """
    columns, failure = None, None
    if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return _saved(datasets, name, split)
    try:
        found = datasets.load_dataset(name, data.subset, split=split, revision=data.revision)
        if found.info.builder_name != "csv":
            return found
        columns = found.column_names
    except datasets.exceptions.DatasetGenerationError as error:  # perhaps for a guess that a later value contradicts
        failure = error
    builder = datasets.load_dataset_builder(name, data.subset, revision=data.revision)
    if failure is not None and builder.info.builder_name != "csv":
        raise failure
    if files := _plain_files(datasets, builder, split):
        kind = "TSV" if builder.config.sep == "\t" else "CSV"
        return datasets.Dataset.from_list(joined(read_csv(Path(file), name, kind=kind) for file in files).rows)
    return _loaded_without_guesses(datasets, data, name, split, builder, columns)


def _saved(datasets: Any, name: str, split: str) -> Any:
    """Return a split, or a slice such as "train[:10%]" of one, of a data set that its `save_to_disk` wrote.

    Such a data set may have no splits; then it is the one that it was a split of.
    """
    found = datasets.load_from_disk(name)
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    asked = datasets.ReadInstruction.from_spec(split).to_absolute({key: len(rows) for key, rows in splits.items()})
    parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in asked]
    return datasets.concatenate_datasets(parts)


def _plain_files(datasets: Any, builder: Any, split: str) -> list[str]:
    """Return the local paths of a split's files if `read_csv` reads them right, with no options but the delimiter."""
    config, declared = builder.config, builder.info.features or {}
    here, usual = config.pd_read_csv_kwargs, type(config)().pd_read_csv_kwargs
    if any(isinstance(kind, datasets.ClassLabel) for kind in declared.values()) or split not in config.data_files:
        return []
    if config.sep not in (",", "\t") or here | {"sep": ","} != usual | {"sep": ","}:
        return []
    files: list[str] = datasets.DownloadManager().download_and_extract(list(config.data_files[split]))
    return files


def _loaded_without_guesses(
    datasets: Any, data: DataConfig, name: str, split: str, builder: Any, columns: Sequence[str] | None
) -> Any:
    """Return a split of CSV or TSV files as the library reads them if it takes every column as text, or as declared."""
    asked = {"name": data.subset, "revision": data.revision}
    if columns is None:
        whole = re.split(r"[\[+]", split)[0]  # without the slice, which a stream does not know
        columns = list(next(iter(datasets.load_dataset(name, split=whole, streaming=True, **asked))))
    declared, text = builder.info.features or {}, datasets.Value("string")
    kinds = {column: declared.get(column) for column in columns}
    return datasets.load_dataset(
        name,
        split=split,
        features=datasets.Features(
            {column: kind if isinstance(kind, datasets.ClassLabel) else text for column, kind in kinds.items()}
        ),
        keep_default_na=False,
        na_values=[""],
        quoting=csv.QUOTE_NONE if builder.config.sep == "\t" else builder.config.quoting,
        **asked,
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
