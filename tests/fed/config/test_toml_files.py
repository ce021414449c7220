"""TOML of any origin, and paths in configurations."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from fed import config as configuration
from fed.config import RunConfig, load, load_saved, located, parse, same_setting
from fed.errors import FedError
from tests.support.hostile import watched

HUGE = f"0x{'f' * 5000}"  # Python writes no integer of so many decimal digits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"rounds = {'9' * 5000}", r"my.toml holds an integer beyond 64 bits"),
        (f"rounds = {HUGE}", r"my.toml: rounds is an integer beyond 64 bits"),
        (f"[clients.ranks]\n4 = {HUGE}", r"my.toml: clients.ranks.4 is an integer beyond 64 bits"),
        (f"seed = {'[' * 5000}", r"my.toml nests lists or tables too deeply"),
        (f"data.partition_options.x = {'[' * 20}{']' * 20}", r"data.partition_options.x is nested too deeply"),
        (f"{'a.' * 100_000}b = 1", r"my.toml joins 50 names or more by dots"),
        (f"[{'a . ' * 100_000}b]", r"my.toml joins 50 names or more by dots"),
        ('"a b".' * 60 + "b = 1", r"my.toml joins 50 names or more by dots"),
        (f"{'x' * 100_000} = 1", r"my.toml: unknown key 'x{99}…; no key is as long"),
        ("data.partition_options.when = 1979-05-27", r"when is 1979-05-27, a date or a time; in quotation marks"),
        ("rounds = 1979-99-99", r"my.toml (is not TOML|holds a value that is none)"),
        (r'data.text = "\u0000"', r"my.toml: data.text is '\\x00': it holds a NUL character"),
        ('[data]\nsubset = ["x"]', r"data.subset is \['x'\]: it should be a valid string"),
        ('[data]\nname = "glue"\nsubset = ["x"]', r"data.subset is \['x'\]: it should be a valid string"),
        (
            "[clients]\ncount = 1000000000\nranks = {4 = 0.5, 8 = 0.5}",
            r"clients.count is 1000000000: it should be less",
        ),
        ("[clients]\nranks = {4 = true}", r"clients.ranks is \{'4': True\}: its shares should be above 0"),
        (f"[data]\npath = '{'x' * 300}'", r"data.path is 'x{99}…: it should be a path with names of at most 255 bytes"),
        (f"[model]\npath = '{'x/' * 3000}'", r"model.path is '(x/)+x?…: it should be a path of at most 4095 bytes"),
        ("[data]\npath = ''", r"data.path is '': it should have at least 1 character"),
        ("[adapter]\nalpha = 1e308", r"adapter.alpha is 1e\+308: it should be less than or equal to 1000000000"),
        ("[adapter]\nalpha = 5e-324", r"adapter.alpha is 5e-324: it should be at least 1e-12"),
        ("[adapter]\ntarget_modules = '(a+)+b'", r"adapter.target_modules holds '\(a\+\)\+b', which can take for ever"),
        ("[adapter]\ntarget_modules = 'a{99999999999}'", r"adapter.target_modules holds .* more than 1000 times"),
        ("[train]\nlocal_steps = 2000000", r"train.local_steps is 2000000: it should be less than or equal to 1000000"),
        ("[data.partition_options]\nnum_partitions = 3", r"num_partitions is set by clients.count"),
    ],
)
def test_what_no_configuration_holds_is_one_line_at_once(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    with watched(2), pytest.raises(FedError, match=message) as refused:
        load(path)
    assert len(str(refused.value)) < 400


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/zero"), tmp_path):
        with watched(2), pytest.raises(FedError, match=r"cannot read .* as a TOML file: it is no regular file"):
            load(path)
    with pytest.raises(FedError, match=r"no preset or file is called '.*loop.toml'"):
        load(tmp_path / "loop.toml")
    with pytest.raises(FedError, match=r"cannot read x+ as a TOML file: File name too long"):
        load("x" * 300)


def test_a_file_as_large_as_no_configuration_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("#" * 1_000_001)
    with pytest.raises(
        FedError, match=r"my.toml is no configuration: it has 1000001 bytes, and one has at most 1000000"
    ):
        load(path)


def test_long_lists_read_back_although_they_are_longer_as_written(tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(100_000)]
    path = tmp_path / "my.toml"
    path.write_text(f"data.tasks = {names}\n".replace(" 'm", "'m"))
    table, _ = configuration.table(path)
    data = RunConfig().data.model_copy(update=table["data"])
    saved = RunConfig().model_copy(update={"data": data})
    configuration.write(saved, tmp_path / "config.toml")
    assert (tmp_path / "config.toml").stat().st_size > 1_000_000
    assert load_saved(tmp_path / "config.toml").data.tasks == names


def test_paths_are_written_absolute_and_stay_as_they_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "base").mkdir()
    table = {
        "model": {"path": "base"},
        "data": {"path": "./rows.jsonl", "test_path": "not/there.jsonl", "cache": "tokens"},
    }
    config = parse(table, where="here")
    configuration.write(config, tmp_path / "config.toml")
    assert (config.data.path, config.model.path, config.data.cache) == ("./rows.jsonl", "base", "tokens")
    written = tomllib.loads((tmp_path / "config.toml").read_text())
    assert written["model"]["path"] == str(tmp_path / "base")
    assert written["data"]["path"] == str(tmp_path / "rows.jsonl")
    assert written["data"]["test_path"] == "not/there.jsonl"
    assert written["data"]["cache"] == str(tmp_path / "tokens")
    monkeypatch.chdir("/")
    assert load_saved(tmp_path / "config.toml").data.path == str(tmp_path / "rows.jsonl")


def test_a_name_on_the_hub_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = {"data": {"name": "hub", "path": "someone/something", "cache": True}, "rounds": 3}
    assert located(table) == table


def test_two_names_of_a_path_are_the_same_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("base")
    assert same_setting("model.path", "base", str(tmp_path / "base"))
    assert same_setting("model.path", "x/../base", "link")
    assert not same_setting("model.path", "base", "other")
    assert not same_setting("data.label", "base", str(tmp_path / "base"))
    assert not same_setting("data.cache", True, "True")
