"""Memory and time by the number of clients: what clients keep between rounds takes no memory if it is on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench.clients import Measured, Point, main, measure_all, measure_point
from bench.harness.memory import tensor_bytes
from bench.harness.records import ResultsError
from bench.report.clients_tables import clients_markdown
from bench.report.command import main as report

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ("adapter.rank=2", "clients.ranks=[2]", "train.local_steps=1", "train.batch_size=2", "data.test_rows=20")
ROW_NUMBERS = 16 * 8  # bytes a client: data.rows_per_client, int64


def test_live_tensors_are_counted_once() -> None:
    beside = torch.eye(2).to_sparse()  # it has no storage to count
    before = tensor_bytes()
    held = torch.ones(1000)
    views = [held[:10], held.view(10, 100)]
    assert tensor_bytes() - before == 4000
    del held, views
    assert tensor_bytes() == before
    assert beside.is_sparse


@pytest.mark.slow
def test_clients_on_disk_cost_their_row_numbers_and_no_more(tmp_path: Path) -> None:
    """40 and 80 clients that each keep a B and a head: tensors in memory grow with the clients, unless kept on disk."""
    few, many, held = (
        measure_point(point, tmp_path, rounds=2, settings=SMALL)
        for point in (Point(40, 2), Point(80, 2), Point(80, 2, kept="memory"))
    )
    assert many.tensor_bytes - few.tensor_bytes == 40 * ROW_NUMBERS
    assert many.kept_bytes == 2 * few.kept_bytes > 80 * 2 * 64 * 4
    assert held.tensor_bytes - many.tensor_bytes > 0.9 * many.kept_bytes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_thousand_clients_of_the_embedded_task_need_the_memory_of_a_hundred(tmp_path: Path) -> None:
    few, many = (measure_point(Point(clients, 10), tmp_path, rounds=2) for clients in (100, 1000))
    assert many.kept_bytes > 100 * 2**20
    assert many.tensor_bytes - few.tensor_bytes == 900 * ROW_NUMBERS


@pytest.mark.slow
def test_a_point_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ResultsError,
        match=r"Point\(clients=2, per_round=3, kept='disk', execution='sequential'\) was not measured: FedError: c",
    ):
        measure_all([Point(2, 3)], tmp_path)


def make_results(path: Path) -> Path:
    figures = {"seconds_per_round": 2.0, "cpu_seconds_per_round": 1.5, "kept_bytes": 10 * 2**20}
    first = Measured(100, 10, tensor_bytes=2 * 2**20, process_bytes=600 * 2**20, **figures)
    second = replace(first, clients=1124, tensor_bytes=3 * 2**20, process_bytes=602 * 2**20, kept_bytes=1124 * 2048)
    points = [asdict(first), asdict(second), asdict(replace(second, kept="memory"))]
    machine = {"device_name": "cpu x", "versions": {"torch": "2", "triton": None}}
    saved = {"kind": "clients", "machine": machine, "commit": "abc", "date": "2026-11-22T", "settings": ["a=1"]}
    path.write_text(json.dumps(saved | {"points": points}))
    return path


def test_the_table_says_what_one_more_client_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_results(tmp_path / "clients-cpu.json")
    assert report([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "| 1,124 | 10 | disk | one by one | 2.00 | 1.50 | 0.150 | 3.0 | 602 | 2 |" in shown
    assert "From 100 to 1,124 clients each client more costs 1.00 KiB of tensors" in shown
    assert "and 2.00 KiB of the process, and keeps 2 KiB on disk." in shown
    assert "The machine had other work meanwhile" in shown
    quiet = json.loads(path.read_text())
    for point in quiet["points"]:
        point["seconds_per_round"] = point["cpu_seconds_per_round"]
    (tmp_path / "quiet.json").write_text(json.dumps(quiet))
    assert "The machine had other work" not in clients_markdown(tmp_path / "quiet.json")
    assert report([str(path), "--keep"]) == 2
    assert "is about clients: it has a table" in capsys.readouterr().err
    path.write_text('{"kind": "clients"}')
    assert report([str(path)]) == 2
    assert "has no 'machine'; `python -m bench.clients` of this version saves it" in capsys.readouterr().err


def test_the_command_writes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = dict.fromkeys(("seconds_per_round", "cpu_seconds_per_round"), 1.0)
    figures |= dict.fromkeys(("tensor_bytes", "process_bytes", "kept_bytes"), 1)
    only = Measured(2, 1, execution="cohort", **figures)
    monkeypatch.setattr("bench.clients.measure_all", lambda points, folder: [only])
    assert main(["--out", str(tmp_path)]) == 0
    assert "| 2 | 1 | disk | in cohorts |" in clients_markdown(tmp_path / "clients-cpu.json")
