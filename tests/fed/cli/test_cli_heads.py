"""The classification head of a checkpoint on the command line: what a run says of it, and when it cannot go on."""

from __future__ import annotations

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
def test_a_run_goes_on_with_its_own_base_and_labels_whatever_becomes_of_the_checkpoint(
    arguments: tuple[str, ...], tmp_path: Path, fed_cli: Call
) -> None:
    out = tmp_path / "run"
    assert fed_cli("run", *arguments, str(out), "--no-centralised").status == 0
    (out / "config.toml").write_text((out / "config.toml").read_text().replace("rounds = 2", "rounds = 3"))
    architecture = tmp_path / "bert" / "config.json"
    architecture.write_text(architecture.read_text().replace('"dog"', '"yes"').replace('"cat"', '"no"'))
    assert fed_cli("resume", str(out), "--no-centralised").status == 0
    whole = tmp_path / "whole"
    architecture.write_text(architecture.read_text().replace('"yes"', '"dog"').replace('"no"', '"cat"'))
    assert fed_cli("run", *arguments, str(whole), "--no-centralised", "--set", "rounds=3").status == 0
    assert without_times(out) == without_times(whole)
    weights = Path("adapter", "adapter_model.safetensors")
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()
