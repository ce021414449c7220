"""JSON files: the shapes they come in, half surrogate pairs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fed.data.json_files import read_json, read_jsonl
from fed.data.rows import Rows, remarks
from fed.errors import FedError

ROWS = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
TASK = {
    "Contributors": ["Somebody"],
    "Categories": ["Text Matching"],
    "Definition": ["Answer the question.", "Be short."],
    "Positive Examples": [{"input": "no", "output": "row", "explanation": ""}],
    "Instances": [
        {"id": "task7-0", "input": "One?", "output": ["1", "one"]},
        {"id": "task7-1", "input": "", "output": "2"},
    ],
}


def read(path: Path, content: str | bytes) -> Rows:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return (read_jsonl if path.suffix == ".jsonl" else read_json)(path, "data.path")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (json.dumps(ROWS), "row 2"),
        (json.dumps(ROWS, indent=2), "row 2"),
        ("".join(json.dumps(row) + "\n" for row in ROWS), "line 2"),
        ("\n" + "\n\n".join(json.dumps(row) for row in ROWS), "line 4"),
        (json.dumps({"text": ["a", "b"], "label": ["x", "y"]}), "row 2"),
        (json.dumps({"text": {"5": "a", "7": "b"}, "label": {"5": "x", "7": "y"}}, indent=1), "row 2"),
    ],
    ids=["list", "indented", "lines", "lines apart", "columns", "columns of pandas"],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_file_comes_in_several_shapes(tmp_path: Path, content: str, place: str, mark: str) -> None:
    rows = read(tmp_path / "rows.json", mark + content)
    assert rows.rows == ROWS
    assert rows.places[1] == f"{tmp_path / 'rows.json'} {place}"
    assert remarks(rows) == []


def test_one_object_is_one_row(tmp_path: Path) -> None:
    for content in (json.dumps(ROWS[0]), json.dumps(ROWS[0], indent=2)):
        assert read(tmp_path / "rows.json", content).rows == ROWS[:1]


def test_a_task_of_natural_instructions_has_a_row_for_each_instance(tmp_path: Path) -> None:
    shared = {"task": "task7_x", "category": "Text Matching", "instruction": "Answer the question.\nBe short."}
    wanted = [{**shared, **instance} for instance in TASK["Instances"]]
    for indent in (None, 4):
        assert read(tmp_path / "task7_x.json", json.dumps(TASK, indent=indent)).rows == wanted
    plain = read(tmp_path / "task7_x.json", json.dumps({"Definition": "Do.", "Instances": TASK["Instances"]}))
    assert plain.rows[0] == {"task": "task7_x", "instruction": "Do.", **TASK["Instances"][0]}


def test_lines_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    first, second = map(json.dumps, ROWS)
    for content in (f"\ufeff{first}\n{second}\n", f"\ufeff{first}\r\n\ufeff{second}\n\ufeff\n", f"{first}\r{second}\r"):
        assert read(tmp_path / "rows.jsonl", content).rows == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path, name: str) -> None:
    lines = [
        '{"text": "whole \\ud83d\\ude00", "label": "\\\\ud83d"}',
        '{"text": "cut \\ud83d", "more": [{"\\uDE00": ["\\udfff!"]}]}',
        '{"text": "ok"}',
        '{"\\ud83dx": "turned \\ude00\\ud83d"}',
    ]
    rows = read(tmp_path / name, "\n".join(lines) if name == "rows.jsonl" else f"[{', '.join(lines)}]")
    assert rows.rows == [
        {"text": "whole 😀", "label": "\\ud83d"},
        {"text": "cut \ufffd", "more": [{"\ufffd": ["\ufffd!"]}]},
        {"text": "ok"},
        {"\ufffdx": "turned \ufffd\ufffd"},
    ]
    place = f"{tmp_path / name} {'line' if name == 'rows.jsonl' else 'row'}"
    assert list(rows.mended) == [f"{place} 2", f"{place} 4"]
    assert remarks(rows) == [
        f"2 of 4 rows hold half a surrogate pair, which is no character and becomes U+FFFD; the first is {place} 2"
    ]


NESTED = '{"a": ' + "[" * 100_000
LONG = '{"a": ' + "1" * 5000 + "}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": 1, "b": 2, "a": 3}', r"line 2: 'a' is there twice in the object \{'a': 3, 'b': 2\}; keys sh"),
        ('{"a": {"b": 1, "b": 1}}', r"line 1: 'b' is there twice in the object"),
        ('{"\\ud83d": 1, "\\ud83e": 2}', r"line 1: keys that differ only in halves of surrogate pairs"),
        ('{"a": 1}\n{"a": }', r"line 2: not JSON: Expecting value at column 7"),
        ('{"a": 1} {"a": 2}', r"line 1: not JSON: Extra data at column 10"),
        (NESTED, r"line 1: lists or objects are nested too deeply"),
        (LONG, r"line 1: an integer has too many digits"),
        ('{"a": 1}\n{"a": "\0"}', r"cannot read it as UTF-8 text: line 2 holds a NUL byte"),
        (b'{"a": 1}\n{"a": "\xed\xa0\xbd"}', r"cannot read it as UTF-8 text: byte 0xed in line 2 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), r"data.path is '.*rows.jsonl': cannot read it as UTF-8 text: it is UTF-16"),
        ('{"a": 1}'.encode("utf-32"), r"it is UTF-32; save it as UTF-8"),
    ],
)
def test_bad_jsonl_is_refused_by_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(FedError, match=message) as caught:
        read(tmp_path / "rows.jsonl", content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, 3]', r"rows.json row 2: holds 3; every row should be a JSON object"),
        ('[\n{"a": 1},\n{"a": ]', r"rows.json: not JSON: Expecting value at line 3 column 7"),
        ('{"a": 1}\n{"a": ', r"rows.json line 2: not JSON"),
        ('[{"a": 1, "a": 2}]', r"rows.json: 'a' is there twice in the object"),
        ('{"a": [1, 2], "b": [1]}', r"the columns 'a' \(2 values\) and 'b' \(1\) have not the same rows"),
        ('{"a": {"0": 1}, "b": {"1": 2}}', r"the columns 'a' \(1 values\) and 'b' \(1\) have not the same rows"),
        ('{"version": 1, "data": [{"a": 1}]}', r"holds an object, whose 'data' seems to be the rows; it should be a l"),
        ("3", r"rows.json: holds 3; it should be a list of rows"),
        ('{"Definition": 3, "Instances": []}', r"'Definition' holds 3; it should be a string or a list of strings"),
        ('{"Definition": "a", "Instances": {"0": {}}}', r"'Instances' holds .*; it should be a list of objects"),
        ('{"Definition": "a", "Instances": ["b"]}', r"rows.json row 1: holds 'b'; every row should be a JSON object"),
        ('{"Definition": "a", "Instances": []}', r"data.path is '.*rows.json': the file holds no rows"),
        ("[]", r"the file holds no rows"),
        ("{}", r"the file holds no rows"),
        (" \n", r"the file holds no rows"),
        (b"[\n\xff]", r"cannot read it as UTF-8 text: byte 0xff in line 2 is not UTF-8"),
        ("[{}]".encode("utf-16"), r"cannot read it as UTF-8 text: it is UTF-16; save it as UTF-8"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(FedError, match=message) as caught:
        read(tmp_path / "rows.json", content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1.0", "0.5", "null", "[1]", '{"b": 1}'])
def test_what_is_no_label_is_refused_by_row(tmp_path: Path, value: str) -> None:
    rows: Any = read(tmp_path / "rows.json", f'[{{"label": 1}}, {{"label": {value}}}]')
    with pytest.raises(
        FedError, match=r"rows.json row 2: data.label 'label' holds .*; it should be a string or an int"
    ):
        rows.column("data.label", "label", (str, int))
