"""Files of any bytes give rows, or one line that names the file."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fed.data.rows import Rows
from fed.data.sources import read, read_local
from fed.errors import FedError
from tests.support.hostile import outcome, watched
from tests.support.text_data import text_config, write_rows

ROWS = [{"text": f"a cat {number}", "label": "cat" if number % 2 else "dog", "number": number} for number in range(8)]
PIECES = [
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b",",
    b"\t",
    b"[",
    b"{",
    b"}",
    b"[" * 5000,
    b"9" * 5000,
    b"\\ud800",
    b"NaN",
]
PIECES += [b"\xef\xbb\xbf", b"\x1b[2J", "\u202e".encode(), b'{"a":1}', b"1e999", b'{"a":{"a":', b"\xed\xa0\x80", b"'"]


def beginnings() -> dict[str, bytes]:
    """Files of each kind, by suffix."""
    table = pyarrow.Table.from_pylist(ROWS)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    task = {"Definition": ["Say it."], "Instances": [{"input": "a", "output": ["b"]}], "Categories": ["c"]}
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    fields = [list(ROWS[0]), *(list(map(str, row.values())) for row in ROWS)]
    comma, tab = ("\n".join(map(sign.join, fields)) for sign in ",\t")
    return {
        ".jsonl": lines,
        ".list.json": json.dumps(ROWS).encode(),
        ".task.json": json.dumps(task).encode(),
        ".columns.json": json.dumps(columns).encode(),
        ".csv": comma.encode(),
        ".tsv": tab.encode(),
        ".parquet": sink.getvalue().to_pybytes(),
        ".gz.json": gzip.compress(lines),
        ".gz.csv": gzip.compress(comma.encode()),
        ".other": lines,
    }


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return some bytes with parts replaced, cut, doubled or inserted."""
    for _ in range(draw.randint(0, 3)):
        at, size = draw.randint(0, len(content)), draw.choice([0, 1, 4, 40])
        kind = draw.random()
        if kind < 0.4:
            piece = draw.choice(PIECES)
        elif kind < 0.7:
            piece = draw.randbytes(draw.randint(1, 8))
        else:
            piece = content[at : at + size] * draw.choice([0, 2])
        content = content[:at] + piece + content[at + size :]
    return content[: draw.randint(0, len(content))] if draw.random() < 0.1 else content


@pytest.mark.parametrize("tried", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_any_bytes_give_rows_or_one_line(tried: int, tmp_path: Path) -> None:
    draw, good = random.Random(0), 0
    kinds = list(beginnings().items())
    for number in range(tried):
        suffix, content = kinds[number % len(kinds)]
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(damaged(content, draw))
        rows, message = outcome(lambda path=path: read_local(str(path), "data.path"))
        if rows is None:
            assert path.name in message
            continue
        assert isinstance(rows, Rows)
        assert len(rows) == len(rows.places) > 0
        good += 1
    assert tried / 10 < good < tried


@pytest.mark.parametrize("key", ["data.path", "data.test_path"])
def test_what_is_no_regular_file_is_refused_at_once(key: str, tmp_path: Path) -> None:
    good = str(write_rows(tmp_path / "good.jsonl", ROWS))
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(folder / "pipe.csv")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for path, why in (
        (tmp_path / "pipe.jsonl", "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (folder, "pipe.csv'?: it is no regular file"),
        (tmp_path / "loop.jsonl", "no such file"),
    ):
        config = text_config(**{"path": good, key.removeprefix("data."): str(path)})
        with watched(2), pytest.raises(FedError, match=f"{key} is '.*{why}"):
            read(config)


def test_rows_to_test_on_are_not_trained_on_by_another_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = write_rows(folder / "a.jsonl", ROWS)
    (tmp_path / "link.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    (tmp_path / "around").symlink_to(folder, target_is_directory=True)
    same = [file, tmp_path / "link.jsonl", tmp_path / "hard.jsonl", folder / ".." / "folder" / "a.jsonl", folder]
    for path, test in [(file, other) for other in same] + [(folder, file), (folder, tmp_path / "around")]:
        with pytest.raises(FedError, match=r"data.test_path is '.*': '.*' is the same file as '.*' of data.path"):
            read(text_config(path, test_path=str(test)))
    copy = write_rows(tmp_path / "copy.jsonl", ROWS)
    assert read(text_config(file, test_path=str(copy))).first_test == len(ROWS)


def test_a_row_that_nests_deeply_and_holds_half_a_pair_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    for depth in (100, 400, 800, 950, 5000):
        path.write_text(f'{{"text": {"[" * depth}"\\ud800"{"]" * depth}}}\n')
        rows, message = outcome(lambda: read_local(str(path), "data.path"))
        assert message.endswith("line 1: lists or objects are nested too deeply") if rows is None else rows.mended
    assert rows is None
