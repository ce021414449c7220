"""Reading a run's files back, and its result as a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from fed.config import RunConfig
from fed.errors import FedError
from fed.report.tables import markdown_table, summary
from fed.simulation.run_directory import read, write_centralised
from tests.support.saved_runs import make_row, make_run


def test_a_run_reads_back_with_its_gains(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", [make_row(number) for number in range(4)])
    run = read(directory)
    assert run.gain_of(run.rows[-1]) == pytest.approx(30)
    assert read(directory).centralised == []
    write_centralised(directory, [{"steps": 20, "accuracy": 0.6, "loss": 1.0, "train_seconds": 1.0}])
    run = read(directory)
    assert run.gain_of(run.centralised[0]) == pytest.approx(50)
    assert run.config == RunConfig()


def test_the_summary_as_markdown_by_hand(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", [make_row(number) for number in range(4)])
    write_centralised(directory, [{"steps": 20, "accuracy": 0.6, "loss": 1.0, "train_seconds": 1.0}])
    assert markdown_table(summary(read(directory))).splitlines() == [
        "| test data: digits turned by 90° | accuracy | gain | ratio |",
        "| --- | ---: | ---: | ---: |",
        "| unadapted model | 10.0 % |  |  |",
        "| Fed-PLoRA, 3 rounds × 3 local steps | 40.0 % | +30.0 points |  |",
        "| centralised LoRA, 20 steps | 60.0 % | +50.0 points | 0.60 |",
    ]


def test_a_last_line_cut_off_is_left_out(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", [make_row(0), make_row(1)])
    with (directory / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "acc')
    assert [row["round"] for row in read(directory).rows] == [0, 1]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedError, match=r"is not a run's directory: there is no config.toml in it"):
        read(tmp_path)
    make_run(tmp_path, [])
    with pytest.raises(FedError, match="holds no rows"):
        read(tmp_path)
