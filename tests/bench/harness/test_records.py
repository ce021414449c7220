"""The file of records: complete after every write, continued only by the same code on the same device."""

import json
from pathlib import Path

import pytest

from bench.harness.records import KEYS, ResultsError, blank, case_key, load_records, open_records

META = {"device": "cpu", "device_name": "Example", "versions": {"torch": "2.13"}, "source": "abc", "commit": "1"}
RECORD = blank(op="forward", m=1, k=2, n=3, r=4, dtype="float32", provider="base", time_ms=1.0, ratio_to_base=1.0)


def test_records_come_back_as_written_and_meta_first(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cpu.json"
    file = open_records(path, META, fresh=False)
    file.add([RECORD])
    meta, records = load_records(path)
    assert {name: meta[name] for name in META} == META
    assert records == [RECORD]
    assert all(name in record for record in json.loads(path.read_text()) for name in KEYS)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_code_resumes_and_a_new_commit_of_it_too(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    open_records(path, META, fresh=False).add([RECORD])
    again = open_records(path, META | {"commit": "2"}, fresh=False)
    assert again.done() == {case_key(RECORD)}
    assert again.meta["commit"] == "1"
    assert open_records(path, META, fresh=True).records == []


@pytest.mark.parametrize("name", ["device_name", "source", "versions"])
def test_other_code_or_devices_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    open_records(path, META, fresh=False).add([RECORD])
    with pytest.raises(ResultsError, match=f"{name}.*--fresh starts over"):
        open_records(path, META | {name: "other"}, fresh=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "no list of records"),
        ("[]", "no list of records"),
        ("[1]", "no list of records"),
        ('[{"op": "meta"}]', "record 0 .* has no 'm'"),
        (json.dumps([RECORD]), "the first must be 'meta'"),
    ],
)
def test_what_is_no_file_of_records_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError, match=said):
        load_records(path)
    with pytest.raises(ResultsError, match="does not exist"):
        load_records(tmp_path / "absent.json")
