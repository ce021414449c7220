"""Counts of updates that were left out, by reason, in tables, on pages and in pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fed.console import Screen
from fed.report import run_figures
from fed.report.left_out import counts, kind_of, left_out_table
from fed.report.summary import METRICS
from fed.report.write import publish_run
from fed.simulation.run_directory import read
from tests.support.saved_runs import make_row, make_run

LEFT_OUT = {"skipped": [3, 1], "faults": ["its training loss is nan", "it grew 300-fold, client 2 1-fold"]}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("its m lora_A holds NaN or infinity", "not finite"),
        ("its training loss is -inf", "not finite"),
        ("its training loss is 'x'; a number would be right", "malformed"),
        ("with it the server's m lora_B would hold NaN or infinity", "would spoil the server's state"),
        ("it says that it took 4 steps; 3 would be right", "another count or weight"),
        ("its weight is 3; 1 would be right", "another count or weight"),
        ("its selection of m is (0); (1) would be right", "other modules"),
        ("its selection lacks m", "other modules"),
        ("it is the update that it sent for the state after round 3", "sent before"),
        ("too few updates are usable: 1 of 2 that server.min_updates asks for", "too few usable in its round"),
        ("its reply cannot be used: it is of round 3, and this is round 4", "sent before"),
        ("its reply cannot be used: it answers another message of this round, or was sent before", "sent before"),
        ("its machine could not train it: there is not enough memory", "not trained by its machine"),
        ("its m lora_A is (1, 2); (2, 2) would be right", "malformed"),
    ],
)
def test_every_reason_has_its_kind(fault: str, kind: str) -> None:
    assert kind_of(fault) == kind


def test_a_table_counts_updates_rounds_and_clients() -> None:
    rows = [
        make_row(0, clients=[]),
        make_row(1, clients=[0, 1, 3], **LEFT_OUT),
        make_row(2, clients=[1, 2, 3], skipped=[3], faults=["its h holds NaN or infinity"], clipped=[1, 2], late=[5]),
    ]
    assert left_out_table(rows) == [
        ("of 7 updates", "updates", "rounds", "clients"),
        ("left out: grew too much", "1", "1", "1"),
        ("left out: not finite", "2", "2", "1"),
        ("no answer in time", "1", "1", "1"),
        ("clipped and used", "2", "1", "2"),
    ]
    assert left_out_table([make_row(0), make_row(1)]) == []


def test_rows_of_earlier_versions_hold_no_reasons() -> None:
    row = make_row(1, skipped=[4, 5])
    assert dict(counts(row)) == {"unknown: the reason was not saved": 2}
    assert left_out_table([row])[1] == ("left out: unknown: the reason was not saved", "2", "1", "2")


def test_a_run_s_page_picture_and_summary_have_them(tmp_path: Path, undrawn: None) -> None:
    run = make_run(tmp_path / "some", [make_row(0), make_row(1, **LEFT_OUT)])
    publish_run(run)
    assert "left out: grew too much" in (run / "report.html").read_text()
    assert [panel.caption for panel in run_figures.panels(read(run))][-1].startswith("Updates left out or clipped")
    console = Console(record=True, width=200)
    screen = Screen()
    screen._out = console
    screen.summarise(read(run))
    assert "left out: not finite" in console.export_text()
    calm = make_run(tmp_path / "none", [make_row(0), make_row(1)])
    publish_run(calm)
    assert "left out" not in (calm / "report.html").read_text()
    assert len(run_figures.panels(read(calm))) == len(run_figures.panels(read(run))) - 1


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path, [make_row(0), make_row(1, **LEFT_OUT), make_row(2, clipped=[1, 2])])
    assert run_figures.draw(run).read_bytes().startswith(b"\x89PNG")


def test_comparisons_count_them_where_there_are_any() -> None:
    metrics = {metric.name: metric for metric in METRICS}
    rows = [make_row(0), make_row(1, **LEFT_OUT, clipped=[7])]
    assert (metrics["left_out"].of(rows), metrics["clipped"].of(rows)) == (2, 1)
    assert (metrics["left_out"].of([make_row(0)]), metrics["clipped"].of([make_row(0)])) == (None, None)
