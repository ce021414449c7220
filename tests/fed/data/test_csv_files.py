"""CSV and TSV files: fields are the text that stands there, and a damaged file is refused by row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed.data import text_lines
from fed.data.csv_files import read_csv
from fed.data.rows import remarks
from fed.errors import FedError


def rows_of(path: Path, content: str | bytes) -> list[dict[str, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_csv(path, "data.path").rows)


def test_a_field_is_the_text_that_stands_there(tmp_path: Path) -> None:
    values = ["NA", "null", "None", "nan", "N/A", "02139", "01", "1", "001", "1.0", "1e5", "True", " x ", "9" * 30]
    rows = rows_of(tmp_path / "rows.csv", "text,label\n" + "".join(f"t,{value}\n" for value in values))
    assert [row["label"] for row in rows] == values
    assert rows_of(tmp_path / "rows.tsv", "text\tlabel\n" + "".join(f"t\t{value}\n" for value in values)) == rows


def test_only_an_empty_field_is_missing(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "rows.csv", 'a,b,c\n,"", \n') == [{"a": None, "b": None, "c": " "}]
    assert rows_of(tmp_path / "rows.tsv", "a\tb\n\t0\n") == [{"a": None, "b": "0"}]


def test_types_do_not_depend_on_other_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows.csv", "text,label\n" + "t,1\n" * 12_000 + "t,other\nt,\n")
    assert [row["label"] for row in rows] == ["1"] * 12_000 + ["other", None]


@pytest.mark.parametrize(
    "quoted", ['" We were surprised', 'he said "no', '"', '""', '"a" b', "'a", 'ends"', '"whole"', '5" disk']
)
def test_a_quotation_mark_in_a_tsv_file_is_text(tmp_path: Path, quoted: str) -> None:
    lines = [f"sentence {number}\t{number % 2}" for number in range(40)]
    lines[5], lines[26] = f"{quoted}\t1", f"{quoted}\t0"
    for end in ("\n", "\r\n"):
        rows = rows_of(tmp_path / "rows.tsv", end.join(["text\tlabel", *lines, ""]))
        assert len(rows) == 40
        assert (rows[5], rows[26]) == ({"text": quoted, "label": "1"}, {"text": quoted, "label": "0"})
    assert rows_of(tmp_path / "rows.TSV", f"{quoted}\tlabel\na\tb\n") == [{quoted: "a", "label": "b"}]


def test_fields_in_quotation_marks_hold_commas_line_ends_and_quotation_marks(tmp_path: Path) -> None:
    content = 'text,label\r\n"a, ""b""\r\nc",x\r\nsay "hi",y\r\n\r\n\ttab,z'
    assert rows_of(tmp_path / "rows.csv", content) == [
        {"text": 'a, "b"\r\nc', "label": "x"},
        {"text": 'say "hi"', "label": "y"},
        {"text": "\ttab", "label": "z"},
    ]


FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"))


@given(rows=st.lists(st.tuples(FIELD, FIELD)))
def test_what_the_library_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("first column", "second"), ("", "1"), *rows])
    expected = [("", "1"), *rows]
    if ("first column", "second") in rows:
        return
    found = read_csv(path, "data.path").rows
    assert [(row["first column"] or "", row["second"] or "") for row in found] == expected


def test_a_row_whose_lines_look_like_rows_is_remarked_on(tmp_path: Path) -> None:
    lines = [f"sentence {number},{number % 2}" for number in range(40)]
    lines[5], lines[26] = '"We were surprised,1', 'so he said",0'  # written without regard to quotation marks
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    rows = read_csv(path, "data.path")
    assert len(rows) == 19
    assert remarks(rows) == [
        "1 of 19 rows span lines that look like rows themselves, as where a quotation mark is meant as text but opens "
        f"a field; the first is {path} row 6"
    ]
    pairs = [f'"sentence {number},{number % 2}\nand another",{number // 2 % 2}\n' for number in range(8)]
    path.write_text("text,label\n" + "".join(pairs))
    assert [line.split(" rows", 1)[0] for line in remarks(read_csv(path, "data.path"))] == ["8 of 8"]
    path.write_text('text,label\n"a, b\nc and\nd",x\n"one\n\ntwo",y\n"one, two",z\n')
    assert remarks(read_csv(path, "data.path")) == []
    path.write_text('text\n"a\nb"\n')
    assert remarks(read_csv(path, "data.path")) == []


def test_prose_with_as_many_commas_as_a_row_is_not_remarked_on(tmp_path: Path) -> None:
    reviews = [f'"Well, number {number}.\nThe end.",{("positive", "negative")[number % 2]}' for number in range(8)]
    path = tmp_path / "reviews.csv"
    path.write_text("review,sentiment\n" + "\n".join(reviews + [line.replace("\n", " ") for line in reviews]) + "\n")
    assert remarks(read_csv(path, "data.path")) == []
    path.write_text("review,sentiment\n" + "\n".join(reviews) + "\n")
    assert remarks(read_csv(path, "data.path")) == []
    path.write_text(",review,sentiment\n" + "".join(f"{number},{line}\n" for number, line in enumerate(reviews * 2)))
    assert remarks(read_csv(path, "data.path")) == []


def test_lines_of_white_space_are_no_rows_beside_several_columns(tmp_path: Path) -> None:
    for name, between in (("rows.csv", ","), ("rows.tsv", "\t")):
        content = f"  \ntext{between}label\na{between}x\n   \nb{between}y\n \n"
        assert rows_of(tmp_path / name, content) == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    assert rows_of(tmp_path / "one.csv", "text\na\n  \n") == [{"text": "a"}, {"text": "  "}]
    with pytest.raises(FedError, match=r"row 2 \(line 4\): it has 1 field"):
        rows_of(tmp_path / "rows.csv", "text,label\na,x\n  \nb\n")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_a_byte_order_mark_are_no_text(tmp_path: Path, end: str, mark: str) -> None:
    for name, between in (("rows.csv", ","), ("rows.tsv", "\t")):
        content = mark + end.join([f"text{between}label", f"a{between}x", "", f"b{between}y", ""])
        assert rows_of(tmp_path / name, content) == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


def test_columns_without_a_name_are_left_out_if_nothing_is_lost(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "index.csv", ",text,label\n0,a,x\n") == [{"text": "a", "label": "x"}]
    assert rows_of(tmp_path / "trailing.csv", "text,label,,\na,x,,\n") == [{"text": "a", "label": "x"}]


def test_a_field_may_be_longer_than_the_librarys_limit(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert rows_of(tmp_path / "rows.csv", f"text\n{'x' * 200_000}\n") == [{"text": "x" * 200_000}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,x\nb\n", r"rows.csv row 2 \(line 3\): it has 1 field; there are 2 columns: text, label"),
        ("text,label\na,x,y\n", r"row 1 \(line 2\): it has 3 fields; there are 2 columns"),
        ("text,label\na,x,\n", r"row 1 \(line 2\): it has 3 fields"),
        ('text,label\n"a\nb",x\n\n"c\nd"\n', r"row 2 \(line 5\): it has 1 field"),
        ('text,label\na,x\n"b,y\nc,z\n', r"row 2 \(line 3\): .* a quotation mark opens a field that no other closes"),
        ('text,label\n"a" b,x\n', r"row 1 \(line 2\): .* after a closing quotation mark a comma should follow"),
        ('"text";"label"\n"a";"x"\n', r"line 1: .* after a closing quotation mark a comma should follow"),
        ("text;label\na;x\n", r"line 1: the only column is 'text;label', which semicolons separate; a CSV file should"),
        ("text\tlabel\na\tx\n", r"which tabs separate; a CSV file should have commas"),
        ("text,text\na,x\n", r"line 1: two columns are called 'text'; their names should differ"),
        ("text,label,\na,b,x\n", r"row 1 \(line 2\): 'x' is in a column without a name"),
        (",\na,x\n", r"line 1: no column has a name"),
        ("text,label\na,x\ntext,label\nb,y\n", r"row 2 \(line 3\): it repeats the column names, as where files were"),
        ("text,label\na,x\n\ufefftext,label\n", r"row 2 \(line 3\): it begins with a byte order mark"),
        ("text,label\n", r"data.path is '.*rows.csv': the file holds no rows"),
        ("", r"data.path is '.*rows.csv': cannot read it as CSV: it has no line of column names"),
        ("text,label\na,\0\n", r"cannot read it as UTF-8 text: line 2 holds a NUL byte"),
        (b"text,label\na,x\nb\xe9,y\n", r"cannot read it as UTF-8 text: byte 0xe9 in line 3 is not UTF-8"),
        ("text,label\na,x\n".encode("utf-16"), r"cannot read it as UTF-8 text: it is UTF-16; save it as UTF-8"),
        ("text,label\na,x\n".encode("utf-16-le"), r"line 1 holds a NUL byte, as UTF-16 text does; save it as UTF-8"),
    ],
)
def test_a_bad_csv_file_is_refused_by_row(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(FedError, match=message) as caught:
        rows_of(tmp_path / "rows.csv", content)
    assert "\n" not in str(caught.value)


def test_a_bad_tsv_file_is_refused_by_row(tmp_path: Path) -> None:
    with pytest.raises(FedError, match=r"rows.tsv row 1 \(line 2\): it has 1 field; there are 2 columns: text, label"):
        rows_of(tmp_path / "rows.tsv", "text\tlabel\na\n")
    with pytest.raises(FedError, match=r"which commas separate; a TSV file should have tabs"):
        rows_of(tmp_path / "rows.tsv", "text,label\na,b\n")


def test_reading_a_large_file_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "_MB", 100)
    shown: list[Any] = []

    @contextmanager
    def stage(name: str, total: int) -> Iterator[Any]:
        shown.append((name, total))
        yield lambda done, note: shown.append(done)

    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "a,x\n" * 1000)
    assert len(read_csv(path, "data.path", stage)) == 1000
    assert shown[0] == ("reading rows.csv: MB", 40)
    assert shown[1:] == sorted(shown[1:])
    assert 15 < len(shown) < 30
    assert shown[-1] == 40
