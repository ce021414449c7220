"""Rounds over SuperNodes with a core each, as `python -m bench.flower` plays longer ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import flower
from bench.harness.machine import usable_cores
from bench.harness.records import ResultsError
from bench.report.node_tables import nodes_markdown

pytestmark = pytest.mark.slow
SMALL = ["--clients", "4", "--steps", "2", "--rounds", "1"]


def test_the_command_writes_what_the_report_reads(tmp_path: Path) -> None:
    counts = [1, 2] if usable_cores() > 1 else [1]
    flower.main(["--out", str(tmp_path), "--nodes", *map(str, counts), *SMALL])
    measured = json.loads((tmp_path / "nodes.json").read_text())["measured"]
    assert [one["nodes"] for one in measured] == counts
    assert all(one["round_seconds"][0] > one["train_seconds"] / one["nodes"] > 0 for one in measured)
    assert len({one["bytes"] for one in measured}) == 1
    assert "4 clients a round of 2 local steps" in nodes_markdown(tmp_path / "nodes.json")


def test_a_run_that_is_not_done_in_time_fails_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="the run came to 0 rows"):
        flower.main(["--out", str(tmp_path), "--nodes", "1", "--seconds", "1", *SMALL])
    assert list(tmp_path.iterdir()) == []


def test_more_nodes_than_cores_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = usable_cores() + 1
    with pytest.raises(SystemExit):
        flower.main(["--out", str(tmp_path), "--nodes", str(count)])
    assert f"{count} SuperNodes need as many cores; there are {count - 1}" in capsys.readouterr().err
