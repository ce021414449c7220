"""Reading CSV and TSV files: what stands in a field is the text, and only an empty field is a missing value."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fed.data.rows import Row, Rows, listed
from fed.data.text_lines import BYTE_ORDER_MARK, read_lines
from fed.data.tokenization import Stage
from fed.errors import FedError

# In a CSV file, quotation marks enclose fields that hold commas or line ends; in a TSV file they are text.
_DIALECTS: dict[str, dict[str, Any]] = {
    "CSV": {"delimiter": ",", "strict": True},
    "TSV": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_LONGEST_FIELD = 2**31 - 1  # the library's own limit of 128 KiB is shorter than some documents


def read_csv(path: Path, key: str, stage: Stage | None = None, kind: str | None = None) -> Rows:
    """Return the rows of a CSV file, or a TSV file if its suffix is .tsv; all values are strings, or None if missing.

    `kind`, "CSV" or "TSV", is for files whose suffix does not say it.

    The first line names the columns. A field that is empty is a missing value; every other is the text that stands
    there, such as "NA" or "007". In a CSV file a field in quotation marks may hold commas, line ends and, doubled,
    quotation marks; in a TSV file a quotation mark is text. Empty lines are skipped, and lines of white space where
    there are several columns. Columns without a name are left out if they are the first, as the row numbers of pandas
    are, or empty. `stage` shows the progress of a large file.

    Raises FedError, with `key` as the name of the setting, if the file cannot be read, a row has more or fewer fields
    than there are columns, quotation marks do not match, or two columns have the same name.
    """
    kind = kind or ("TSV" if path.suffix.lower() == ".tsv" else "CSV")
    rows, places = [], []
    suspects: dict[int, list[list[str]]] = {}
    with closing(read_lines(path, key, stage)) as lines, _long_fields():
        records = _records(lines, path, kind)
        line, header, _ = next(records, (0, [], []))
        if not header:
            raise FedError(f"{key} is {str(path)!r}: cannot read it as {kind}: it has no line of column names")
        _check_header(header, f"{path} line {line}", kind)
        for number, (line, fields, spanned) in enumerate(records, start=1):
            if len(fields) != len(header) or fields[0].startswith(BYTE_ORDER_MARK) or fields == header:
                raise FedError(f"{path} row {number} (line {line}): {_why_no_row(fields, header)}")
            rows.append(_row(header, fields, f"{path} row {number} (line {line})"))
            places.append(f"{path} row {number}")
            if len(spanned) > 1 and _look_like_rows(spanned, len(header)):
                suspects[len(rows) - 1] = [line.rstrip("\r\n").split(",") for line in spanned]
    if not rows:
        raise FedError(f"{key} is {str(path)!r}: the file holds no rows")
    return Rows(rows, places, doubtful=[places[index] for index in _doubtful(header, rows, suspects)])


def _records(lines: Iterator[str], path: Path, kind: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield of every record, the header among them, its first line's number, its fields and its lines.

    Empty lines are skipped, and lines of white space unless there is one column, in which they may be text. The list of
    lines is the same one for all records.
    """
    spanned: list[str] = []

    def kept() -> Iterator[str]:
        for line in lines:
            spanned.append(line)
            yield line

    reader = csv.reader(kept(), **_DIALECTS[kind])
    number = 0  # of rows; the first record is the header
    columns = 0
    while True:
        line = reader.line_num + 1
        spanned.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            place = f"row {number} (line {line})" if number else f"line {line}"
            raise FedError(f"{path} {place}: cannot read it as {kind}: {_explained(error)}") from None
        blank = len(fields) == 1 != columns and not "".join(spanned).strip()
        if fields and not blank:
            number += 1
            columns = columns or len(fields)
            yield line, fields, spanned


def _look_like_rows(lines: Sequence[str], columns: int) -> bool:
    """Return whether each line of one row has as many commas as a row without quotation marks would have."""
    return columns > 1 and all(line.count(",") == columns - 1 for line in lines)


def _doubtful(header: Sequence[str], rows: Sequence[Row], suspects: Mapping[int, Sequence[Sequence[str]]]) -> list[int]:
    """Return which rows may be several, of `suspects`: indices of rows, with the fields that their lines would have.

    Where the values of a column repeat, as labels do, those fields should be among them; in the prose of a review that
    has several lines, what follows a comma is not.
    """
    left = dict(suspects)
    for position, name in enumerate(header if suspects else ()):
        values = {row.get(name) for row in rows}
        if name and 2 * len(values) <= len(rows):
            left = {
                index: lines
                for index, lines in left.items()
                if all((fields[position].strip('"') or None) in values for fields in lines)
            }
    return list(left)


def _explained(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a quotation mark opens a field that no other closes"
    if "expected after" in str(error):
        return "after a closing quotation mark a comma should follow, and one inside a field should be doubled"
    return str(error)


def _check_header(header: Sequence[str], place: str, kind: str) -> None:
    """Raise FedError if two columns have the same name, or other characters seem to separate the columns."""
    own = _DIALECTS[kind]["delimiter"]
    if len(header) == 1:
        for other in _DELIMITERS:
            if other != own and other in header[0]:
                raise FedError(
                    f"{place}: the only column is {header[0]!r:.60}, which {_DELIMITERS[other]} separate; "
                    f"a {kind} file should have {_DELIMITERS[own]}"
                )
    named = [name for name in header if name]
    if not named:
        raise FedError(f"{place}: no column has a name; the first line of a {kind} file should name them")
    for name in named:
        if named.count(name) > 1:
            raise FedError(f"{place}: two columns are called {name!r}; their names should differ")


def _why_no_row(fields: Sequence[str], header: Sequence[str]) -> str:
    if fields[0].startswith(BYTE_ORDER_MARK):
        return "it begins with a byte order mark, as where files were joined; they should be read one by one"
    if fields == header:
        return "it repeats the column names, as where files were joined; they should be read one by one"
    count = f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
    return f"it has {count}; there are {len(header)} columns: {listed(header)}"


def _row(header: Sequence[str], fields: Sequence[str], place: str) -> Row:
    row = {name: field or None for name, field in zip(header, fields, strict=True)}
    if "" in row:
        del row[""]
        for name, field in zip(header[1:], fields[1:], strict=True):
            if field and not name:
                raise FedError(f"{place}: {field!r:.40} is in a column without a name; each should have one")
    return row


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within the context, let the library `csv` read fields of any length."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
