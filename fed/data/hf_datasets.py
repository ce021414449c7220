"""What the library `datasets` reads: CSV and Parquet files, and data sets of the hub. Only needed for those."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed.errors import FedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fed.config.data import DataConfig

Row = dict[str, Any]


def read_table(path: Path, kind: str, key: str) -> list[Row]:
    """Return the rows of a CSV (a TSV if it is called so) or Parquet file; nothing is left in any cache."""
    options: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
    what = f"{key} is {str(path)!r}: cannot read it as {kind.upper() if kind == 'csv' else kind.capitalize()}"
    with _loading(what) as datasets, tempfile.TemporaryDirectory() as cache:
        found = datasets.load_dataset(
            kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True, **options
        )
        rows: list[Row] = found.to_list()
    if not rows:
        raise FedError(f"{key} is {str(path)!r}: the file holds no rows")
    return rows


def load(
    data: DataConfig, name: str, split: str, choose: Callable[[Mapping[str, Any]], Sequence[int]] | None = None
) -> tuple[list[Row], Sequence[str] | None]:
    """Return a split's rows, and the names of the column `data.label` where it holds numbers that have names.

    `choose` takes the columns and says which rows are wanted, before any of them is brought into memory.
    """
    subset = data.subset
    named = f"{name!r}{f' {subset!r}' if subset else ''}, split {split!r}"
    with _loading(f"data set {named} does not load") as datasets:
        found = datasets.load_dataset(name, subset, split=split, revision=data.revision)
        names: Sequence[str] | None = getattr(found.features.get(data.label), "names", None)
        if choose is not None:
            found = found.select(choose(found))
        rows: list[Row] = found.to_list()
    if not rows:
        raise FedError(f"data set {named} holds no rows")
    return rows, names


@contextmanager
def _loading(what: str) -> Iterator[Any]:
    """Give `datasets`, its bars and messages off inside; what it raises over a user's data becomes one line."""
    try:
        import datasets
    except ImportError:
        raise FedError("this data needs the library datasets: install plora-kernels[data]") from None
    hidden, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # its CSV reader leaves closing to the collector
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
