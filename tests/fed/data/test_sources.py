"""Rows from files, folders and the hub, valid and invalid. Nothing here reaches a network: the hub is a fake."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

from fed.config import RunConfig, parse
from fed.data.rows import remarks
from fed.data.sources import Rows, read
from fed.errors import FedError
from tests.support.text_data import text_config, write_rows


def texts_and_labels(config: RunConfig) -> tuple[list[str], list[str]]:
    rows = read(config)
    return rows.column("data.text", config.data.text), rows.column("data.label", config.data.label, (str, int))


def test_jsonl_rows_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "á\\u2028b", "label": 1}\r\n\n{"label": "x", "text": "", "more": null}\n  \n', "utf-8")
    assert texts_and_labels(text_config(path)) == (["á\u2028b", ""], [1, "x"])
    assert read(text_config(path)).places == [f"{path} line 1", f"{path} line 3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": ', r"rows.jsonl line 2: not JSON"),
        ("[1, 2]\n", r"line 1: holds \[1, 2\]; every line should be a JSON object"),
        ('{"text": "a", "output": "x"}', r"line 1: data.label is 'label'; the columns there are text, output"),
        ('\n{"input": "a", "label": "x"}', r"line 2: data.text is 'text'; the columns there are input, label"),
        ('{"text": 3, "label": "x"}', r"line 1: data.text 'text' holds 3; it should be a string"),
        ('{"text": "a", "label": null}', r"line 1: data.label 'label' holds None; it should be a string or an integer"),
        ('{"text": "a", "label": 0.5}', r"data.label 'label' holds 0.5"),
        ("\n\n", r"the file holds no rows"),
    ],
)
def test_a_bad_jsonl_file_is_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(FedError, match=message) as caught:
        texts_and_labels(text_config(path))
    assert "\n" not in str(caught.value)


def test_a_jsonl_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedError, match=r"data.path is '.*none.jsonl': there is no such file"):
        read(text_config(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe1"}')
    with pytest.raises(FedError, match="cannot read it as UTF-8 text"):
        read(text_config(tmp_path / "latin.jsonl"))


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"of {name}", "label": name}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (tmp_path / "._b.csv").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    rows = read(text_config(tmp_path))
    assert rows.rows == [{"file": name, "text": f"of {name}", "label": name} for name in ("a", "b")]
    assert rows.places == [f"{tmp_path / 'a.jsonl'} line 1", f"{tmp_path / 'b.jsonl'} line 1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FedError, match=r"data.path is '.*empty': the folder holds no .jsonl, .json, .csv, .tsv, .parquet file"
    ):
        read(text_config(tmp_path / "empty"))


def test_csv_and_tsv_files_are_read_as_text_and_parquet_files_with_their_types(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text,label\n"a, b",1\nc,0\n')
    (tmp_path / "rows.tsv").write_text("text\tlabel\na, b\t1\nc\t0\n")
    datasets.Dataset.from_dict({"text": ["a, b", "c"], "label": [1, 0]}).to_parquet(tmp_path / "rows.parquet")
    for suffix, labels in (("csv", ["1", "0"]), ("tsv", ["1", "0"]), ("parquet", [1, 0])):
        assert texts_and_labels(text_config(tmp_path / f"rows.{suffix}")) == (["a, b", "c"], labels)


def test_a_text_column_of_numbers_is_refused_where_the_file_has_types(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n1,x\n2,y\n")
    assert texts_and_labels(text_config(tmp_path / "rows.csv")) == (["1", "2"], ["x", "y"])
    datasets.Dataset.from_dict({"text": [1, 2], "label": ["x", "y"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(FedError, match=r"rows.parquet row 1: data.text 'text' holds 1; it should be a string"):
        texts_and_labels(text_config(tmp_path / "rows.parquet"))


# The library leaves the file open; collected here, it does not cause a warning in another test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_table_that_cannot_be_read_is_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(FedError, match=rf"data.path is '.*{name}': cannot read it as (CSV|Parquet): ") as caught:
        read(text_config(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    del caught
    gc.collect()


def test_without_the_library_only_parquet_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read(text_config(write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])))) == 1
    (tmp_path / "rows.csv").write_text("text,label\na,x\n")
    assert len(read(text_config(tmp_path / "rows.csv"))) == 1
    (tmp_path / "rows.parquet").write_text("")
    with pytest.raises(FedError, match=r"needs the library datasets: install plora-kernels\[data\]"):
        read(text_config(tmp_path / "rows.parquet"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, datasets.Dataset]], list[tuple[Any, ...]]]:
    """Replace the hub by data sets by split; return the list of calls made to it."""

    def put(splits: dict[str, datasets.Dataset]) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(name: str, subset: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
            calls.append((name, subset, split, revision))
            if split not in splits:
                raise ValueError(f'Unknown split "{split}".\nThere are {list(splits)}.')
            return splits[split]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return put


def config_of(name: str, **data: Any) -> RunConfig:
    return parse({"model": {"path": "m"}, "data": {"name": name, **data}}, where="here")


def sentences(texts: list[str], labels: list[int]) -> datasets.Dataset:
    names = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})
    return datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features=features)


def test_a_glue_task_knows_its_columns_its_labels_and_its_test(hub: Callable) -> None:
    calls = hub({"train": sentences(["good", "bad"], [1, 0]), "validation": sentences(["fine"], [1])})
    config = config_of("glue", subset="sst2")
    rows = read(config)
    assert calls == [("nyu-mll/glue", "sst2", "train", None), ("nyu-mll/glue", "sst2", "validation", None)]
    assert texts_and_labels(config) == (["good", "bad", "fine"], [1, 0, 1])
    assert (rows.first_test, rows.label_names) == (2, ["negative", "positive"])
    assert rows.places[2] == "nyu-mll/glue validation row 1"
    pair = config_of("glue", subset="mnli").data
    assert (pair.text, pair.text_pair, pair.test_split) == ("premise", "hypothesis", "validation_matched")


def test_a_task_glue_does_not_have_is_refused() -> None:
    for subset in (None, "stsb"):
        with pytest.raises(FedError, match=rf"data.subset is {subset!r}: .* it should be one of cola, mnli, mrpc"):
            config_of("glue", **({"subset": subset} if subset else {}))


def test_natural_instructions_come_from_a_folder_or_the_hub_with_the_same_columns(
    tmp_path: Path, hub: Callable
) -> None:
    row = {"category": "c", "instruction": "i", "input": "n", "output": "o"}
    for task in ("task2", "task11", "task1"):
        write_rows(tmp_path / f"{task}.jsonl", [row])
    rows = read(config_of("natural-instructions", path=str(tmp_path), tasks=["task1", "task2"]))
    assert rows.rows == [{"task": "task1", **row}, {"task": "task2", **row}]
    with pytest.raises(FedError, match=r"data.tasks names 'task3'; there are task1, task11, task2"):
        read(config_of("natural-instructions", path=str(tmp_path), tasks=["task3"]))
    names = ["task1_x", "task11_y", "task1_x"]
    columns = {"task_name": names, "definition": ["i"] * 3, "inputs": ["n", "m", "k"], "targets": ["o"] * 3}
    calls = hub({"train": datasets.Dataset.from_dict(columns)})
    rows = read(config_of("natural-instructions", tasks=["task1"]))
    assert rows.rows == [{"task": "task1_x", "instruction": "i", "input": text, "output": "o"} for text in ("n", "k")]
    assert calls == [("Muennighoff/natural-instructions", None, "train", None)]
    assert config_of("natural-instructions").data.task == "instruction"


def test_published_task_files_are_read_and_chosen_as_others(tmp_path: Path) -> None:
    instance = {"id": "0", "input": "n", "output": ["o", "p"]}
    task = {"Categories": ["c"], "Definition": ["i"], "Instances": [instance]}
    for name in ("task2_a", "task11_b", "task1_c"):
        (tmp_path / f"{name}.json").write_text(json.dumps(task))
    wanted = [{"task": name, "category": "c", "instruction": "i", **instance} for name in ("task1_c", "task2_a")]
    assert read(config_of("natural-instructions", path=str(tmp_path), tasks=["task1", "task2"])).rows == wanted
    one = config_of("natural-instructions", path=str(tmp_path / "task2_a.json"), tasks=["task2"])
    assert read(one).rows == wanted[1:]
    files = read(config_of("files", path=str(tmp_path), task="instruction"))
    assert [(row["file"], row["task"], row["output"]) for row in files.rows] == [
        (name, name, ["o", "p"]) for name in ("task11_b", "task1_c", "task2_a")
    ]


def test_tasks_are_chosen_in_one_file_by_its_column_or_its_name(tmp_path: Path) -> None:
    row = {"definition": "i", "inputs": "n", "targets": "o"}
    mixed = write_rows(tmp_path / "all.jsonl", [{**row, "task_name": f"task{number}_x"} for number in (1, 2, 11)])
    found = read(config_of("natural-instructions", path=str(mixed), tasks=["task1", "task11"]))
    assert [row["task"] for row in found.rows] == ["task1_x", "task11_x"]
    assert [place.rsplit(" ", 1)[1] for place in found.places] == ["1", "3"]
    with pytest.raises(FedError, match=r"data.tasks names 'task3'; there are task11_x, task1_x, task2_x"):
        read(config_of("natural-instructions", path=str(mixed), tasks=["task3"]))
    alone = write_rows(tmp_path / "task5_y.jsonl", [row])
    assert len(read(config_of("natural-instructions", path=str(alone), tasks=["task5"]))) == 1
    with pytest.raises(FedError, match=r"data.tasks names 'task6'; there are task5_y"):
        read(config_of("natural-instructions", path=str(alone), tasks=["task6"]))


def test_a_folder_may_hold_files_of_all_kinds_in_any_case(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.JSONL", [{"text": "a", "label": "x"}])
    (tmp_path / "b.Csv").write_text("text,label\nb,x\n")
    (tmp_path / "c.TSV").write_text('text\tlabel\n"c\tx\n')
    (tmp_path / "d.json").write_text('[{"text": "d", "label": "x"}]')
    assert texts_and_labels(text_config(tmp_path)) == (["a", "b", '"c', "d"], ["x"] * 4)


def test_replaced_characters_are_said_once_for_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("a", "b"):
        write_rows(folder / f"{name}.jsonl", [{"text": "whole", "label": "x"}, {"text": "\ud83d", "label": "\ude00"}])
    test = write_rows(tmp_path / "test.jsonl", [{"text": "\ud83d", "label": "x"}])
    rows = read(text_config(folder, test_path=str(test)))
    assert [row["text"] for row in rows.rows] == ["whole", "\ufffd", "whole", "\ufffd", "\ufffd"]
    assert (rows.first_test, rows.rows[1]["label"]) == (4, "\ufffd")
    assert remarks(rows) == [
        "3 of 5 rows hold half a surrogate pair, which is no character and becomes U+FFFD; the first is "
        f"{folder / 'a.jsonl'} line 2"
    ]
    assert remarks(rows.take([0, 3])) == [
        "1 of 2 rows hold half a surrogate pair, which is no character and becomes U+FFFD; the first is "
        f"{folder / 'b.jsonl'} line 2"
    ]


def test_parquet_values_keep_their_types_and_missing_ones_are_none(tmp_path: Path) -> None:
    columns = {"text": ["a", None, "c"], "label": [2**62, None, 1], "more": [["x"], [], None]}
    path = tmp_path / "rows[1]*.parquet"  # a name, not a pattern
    datasets.Dataset.from_dict(columns).to_parquet(path)
    rows = read(text_config(path))
    assert rows.rows == [{name: values[index] for name, values in columns.items()} for index in range(3)]
    with pytest.raises(
        FedError, match=r"parquet row 2: data.label 'label' holds None; it should be a string or an int"
    ):
        rows.column("data.label", "label", (str, int))


def test_parquet_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(FedError, match=r"rows.parquet: two columns are called 'text'; their names should differ"):
        read(text_config(tmp_path / "rows.parquet"))


def test_parquet_text_that_is_not_utf8_is_refused_by_row(tmp_path: Path) -> None:
    bytes_of_text = pyarrow.array([b"good", b"", b"half \xed\xa0\xbd"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, bytes_of_text.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"label": ["x", "y", "x"], "text": text}), tmp_path / "rows.parquet")
    with pytest.raises(FedError, match=r"rows.parquet row 3: 'text' should be UTF-8 text; it holds byte 0xed$"):
        read(text_config(tmp_path / "rows.parquet"))


@pytest.fixture
def library_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


# The library's CSV reader leaves files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("library_cache")
def test_csv_files_of_a_data_set_are_the_text_that_stands_there(tmp_path: Path) -> None:
    def found(name: str, **files: str) -> list[tuple[Any, Any]]:
        folder = tmp_path / name
        folder.mkdir()
        for split, content in files.items():
            (folder / f"{split}.{name[:3]}").write_text(content)
        rows = read(config_of("hub", path=str(folder), test_split="test" if "test" in files else None))
        assert rows.first_test == (len(rows) - 1 if "test" in files else None)
        return [(row["text"], row["label"]) for row in rows.rows]

    train = "text,label\nNA,01\nnull,\nc,001\n"
    assert found("csv", train=train, test="text,label\n7,1.0\n") == [
        *[("NA", "01"), ("null", None), ("c", "001")],
        ("7", "1.0"),
    ]
    assert found("csv late", train="text,label\n" + "t,1\n" * 20_000 + "t,other\n")[-2:] == [("t", "1"), ("t", "other")]
    quoted = 'text\tlabel\n"a\t1\nb\t2\n"c\t1\n'
    assert found("tsv", train=quoted) == [('"a', "1"), ("b", "2"), ('"c', "1")]
    (tmp_path / "csv part").mkdir()
    (tmp_path / "csv part" / "train.csv").write_text(train)
    part = read(config_of("hub", path=str(tmp_path / "csv part"), split="train[:2]"))
    assert part.rows == [{"text": "NA", "label": "01"}, {"text": "null", "label": None}]
    swallowing = "text,label\n" + "".join(f"{chr(34) if n in (5, 26) else ''} s{n},{n % 2}\n" for n in range(40))
    with pytest.raises(FedError, match=r"train.csv row 6 \(line 7\): cannot read it as CSV: after a closing quotation"):
        found("csv swallowing", train=swallowing)


CARD = """---
configs:
- config_name: default
  data_files: train.csv
  sep: ';'
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': no
          '1': yes
---
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("library_cache")
def test_csv_files_of_a_data_set_with_options_and_labels_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.replace("no\n", "'no'\n").replace("yes\n", "'yes'\n"))
    (tmp_path / "train.csv").write_text("text;label\nNA;0\n007;1\n")
    rows = read(config_of("hub", path=str(tmp_path)))
    assert (rows.rows, rows.label_names) == ([{"text": "NA", "label": 0}, {"text": "007", "label": 1}], ["no", "yes"])


def test_dolly_has_the_columns_of_an_instruction_from_the_hub_or_a_file(tmp_path: Path, hub: Callable) -> None:
    row = {"instruction": "i", "context": "", "response": "r", "category": "open_qa"}
    wanted = {"instruction": "i", "input": "", "output": "r", "category": "open_qa"}
    hub({"train": datasets.Dataset.from_list([row])})
    assert read(config_of("dolly")).rows == [wanted]
    assert read(config_of("dolly", path=str(write_rows(tmp_path / "dolly.jsonl", [row])))).rows == [wanted]


def test_a_column_under_both_of_its_names_is_refused(tmp_path: Path) -> None:
    row = {"instruction": "i", "context": "", "input": "n", "response": "r"}
    with pytest.raises(
        FedError, match=r"dolly.jsonl line 1: 'context' is read as 'input' of dolly, but there is such a"
    ):
        read(config_of("dolly", path=str(write_rows(tmp_path / "dolly.jsonl", [row]))))


def test_any_data_set_of_the_hub_is_read_by_name(hub: Callable) -> None:
    calls = hub({"train": sentences(["a"], [0]), "test": sentences(["b", "c"], [1, 1])})
    rows = read(config_of("hub", path="someone/some", subset="part", test_split="test", revision="v1"))
    assert calls == [("someone/some", "part", "train", "v1"), ("someone/some", "part", "test", "v1")]
    assert (len(rows), rows.first_test) == (3, 1)


def test_a_data_set_that_was_saved_to_disk_is_read_by_split(tmp_path: Path) -> None:
    both = {"train": sentences(["a", "b", "c", "d"], [0, 1, 1, 0]), "test": sentences(["e"], [1])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    rows = read(config_of("hub", path=str(tmp_path / "saved"), test_split="test"))
    assert [row["sentence"] for row in rows.rows] == ["a", "b", "c", "d", "e"]
    assert (rows.first_test, rows.label_names) == (4, ["negative", "positive"])
    part = read(config_of("hub", path=str(tmp_path / "saved"), split="train[:50%]+test"))
    assert [row["sentence"] for row in part.rows] == ["a", "b", "e"]
    one = read(config_of("hub", path=str(tmp_path / "saved" / "train")))
    assert [row["sentence"] for row in one.rows] == ["a", "b", "c", "d"]
    with pytest.raises(FedError, match=r"split 'dev' does not load: Unknown split \"dev\"\. Should be one of"):
        read(config_of("hub", path=str(tmp_path / "saved"), split="dev"))


def test_a_data_set_that_does_not_load_is_one_line(hub: Callable) -> None:
    hub({"train": sentences([], [])})
    with pytest.raises(FedError, match=r"data set 'a/b', split 'dev' does not load: Unknown split") as caught:
        read(config_of("hub", path="a/b", split="dev"))
    assert "\n" not in str(caught.value)
    with pytest.raises(FedError, match=r"data set 'a/b', split 'train' holds no rows"):
        read(config_of("hub", path="a/b"))


def test_columns_may_be_missing_only_where_they_may_be_empty() -> None:
    rows = Rows([{"a": "x"}, {"a": None}, {}], ["one", "two", "three"])
    assert rows.column("data.prompt", "a", empty=True) == ["x", None, None]
    with pytest.raises(FedError, match=r"two: data.text 'a' holds None"):
        rows.column("data.text", "a")
