"""The classification head of a checkpoint on the command line: what a run says of it, and when it cannot go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command_line import Call, without_times
from tests.support.text_data import PETS, write_rows
from tests.support.tiny_bert import make_tiny_bert

SETTINGS = """
rounds = 2
[data]
max_length = 16
cache = false
[clients]
count = 2
per_round = 2
ranks = [2]
[adapter]
rank = 2
[train]
local_steps = 1
[measure]
similarity = false
"""


@pytest.fixture
def arguments(tmp_path: Path) -> tuple[str, ...]:
    """The arguments behind the command: rows of the labels yes and no, and a checkpoint whose head has others."""
    rows = [{"text": PETS[number % 8], "label": ("yes", "no")[number % 2]} for number in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    make_tiny_bert(tmp_path / "bert", PETS, hidden=32, labels=("dog", "cat"))
    (tmp_path / "my.toml").write_text(SETTINGS)
    paths = (f"model.path={tmp_path / 'bert'}", f"data.path={tmp_path / 'rows.jsonl'}")
    return (str(tmp_path / "my.toml"), *(part for path in paths for part in ("--set", path)), "--out")


@pytest.mark.usefixtures("undrawn")
def test_a_new_head_is_one_line_of_a_run_and_of_a_comparison(
    arguments: tuple[str, ...], tmp_path: Path, fed_cli: Call
) -> None:
    line = (
        f"warning: model.path is {str(tmp_path / 'bert')!r}: the labels of the checkpoint's head are 'dog', 'cat', "
        "those of the data 'no', 'yes'; the run starts from a new head\n"
    )
    ran = fed_cli("run", *arguments, str(tmp_path / "run"), "--no-centralised")
    assert (ran.status, ran.err) == (0, line)
    resumed = fed_cli("resume", str(tmp_path / "run"), "--no-centralised")
    assert (resumed.status, resumed.err) == (0, "")  # it goes on with the head it has
    compared = fed_cli("compare", *arguments, str(tmp_path / "all"), "--methods", "fed-plora,fedit", "--seeds", "0-1")
    assert (compared.status, compared.err) == (0, line)


@pytest.mark.usefixtures("undrawn")
def test_a_run_with_a_copy_goes_on_whatever_becomes_of_the_checkpoint(
    arguments: tuple[str, ...], tmp_path: Path, fed_cli: Call
) -> None:
    out = tmp_path / "run"
    assert fed_cli("run", *arguments, str(out), "--no-centralised", "--copy-base").status == 0
    assert (out / "base" / "model.safetensors").is_file()
    (out / "config.toml").write_text((out / "config.toml").read_text().replace("rounds = 2", "rounds = 3"))
    architecture = tmp_path / "bert" / "config.json"
    architecture.write_text(architecture.read_text().replace('"dog"', '"yes"').replace('"cat"', '"no"'))
    assert fed_cli("resume", str(out), "--no-centralised").status == 0
    (tmp_path / "bert").rename(tmp_path / "elsewhere")
    assert fed_cli("resume", str(out)).status == 0
    whole = tmp_path / "whole"
    (tmp_path / "elsewhere").rename(tmp_path / "bert")
    architecture.write_text(architecture.read_text().replace('"yes"', '"dog"').replace('"no"', '"cat"'))
    assert fed_cli("run", *arguments, str(whole), "--no-centralised", "--set", "rounds=3").status == 0
    assert without_times(out) == without_times(whole)
    weights = Path("adapter", "adapter_model.safetensors")
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_refers_to_the_checkpoint_and_names_the_runs_it_cannot_go_on_with(
    arguments: tuple[str, ...], tmp_path: Path, fed_cli: Call
) -> None:
    out, bert = tmp_path / "all", tmp_path / "bert"
    compared = fed_cli("compare", *arguments, str(out), "--vary", "model.dtype=auto,bfloat16", "--seeds", "0")
    assert compared.status == 0
    auto, half = (out / "runs" / f"fed-plora.dtype-{name}" / "seed-0" for name in ("auto", "bfloat16"))
    for run, dtype in ((auto, "float32"), (half, "bfloat16")):
        assert not list(run.rglob("model.safetensors"))
        assert json.loads((run / "base" / "checkpoint.json").read_text())["dtype"] == dtype
        assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bert)
    (half / "finished.json").unlink()
    (bert / "config.json").write_text((bert / "config.json").read_text() + " ")
    failed = fed_cli("resume", str(out))
    assert failed.status == 2
    assert failed.err.startswith("error: the comparison in ")
    assert "the checkpoint at model.path changed since" in failed.err
    assert fed_cli("report", str(out)).status == 0


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_refers_to_a_checkpoint_is_refused_if_that_changed_or_is_gone(
    arguments: tuple[str, ...], tmp_path: Path, fed_cli: Call
) -> None:
    out, bert = tmp_path / "run", tmp_path / "bert"
    assert fed_cli("run", *arguments, str(out), "--no-centralised").status == 0
    assert sorted(path.name for path in (out / "base").glob("*.safetensors")) == ["drawn.safetensors"]
    (out / "config.toml").write_text((out / "config.toml").read_text().replace("rounds = 2", "rounds = 3"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    whole = (bert / "config.json").read_text()
    refers = f"error: the base model in {str(out / 'base')!r} refers to the checkpoint {str(bert)!r}"
    (bert / "config.json").write_text(whole.replace('"dog"', '"yes"'))
    changed = ": config.json changed since the run began; put back what was there, or start the run anew\n"
    for command in (("resume", str(out), "--no-centralised"), ("noise", str(out))):
        outcome = fed_cli(*command)
        assert outcome.status == 2
        assert command[0] == "noise" or outcome.err == refers + changed
    (bert / "config.json").write_text(whole)
    (bert / "adapter_config.json").write_text("{}")
    outcome = fed_cli("resume", str(out))
    assert (outcome.status, "adapter_config.json was not there when the run began" in outcome.err) == (2, True)
    (bert / "adapter_config.json").unlink()
    bert.rename(tmp_path / "moved")
    outcome = fed_cli("resume", str(out))
    gone = ", which is gone; put it back, or set model.path in the run's config.toml to where it is now\n"
    assert (outcome.status, outcome.err) == (2, refers + gone)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert fed_cli("report", str(out)).status == 0  # which needs no base
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace(f'"{bert}"', f'"{tmp_path / "moved"}"'))
    assert fed_cli("resume", str(out), "--no-centralised").status == 0
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "moved")
