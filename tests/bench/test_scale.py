"""The cost model held to small runs, and a server to few clients, as `python -m bench.scale` does with larger ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench.scale.command as scale
from bench.report.scale_tables import projected_markdown, scale_markdown
from bench.scale.checks import Line, _line, check
from bench.scale.models import Size
from bench.scale.population import Point, measure
from bench.scale.projection import project
from fed.experiments.costs.memory import CLIENT_BYTES, STORED_BYTES

ROOT = Path(__file__).parents[2]

TINY = Size("tiny", "llama", width=64, layers=1, length=12, answer=5, batch=3)


def test_a_small_language_model_s_bytes_and_operations_are_exact_and_its_memory_near() -> None:
    found = check(TINY, timed=False)
    assert found["lines"] == []
    assert {one["what"] for one in found["compared"]} == {"bytes", "operations", "memory"}
    for one in found["compared"]:
        if one["what"] == "memory":
            assert 0.5 < one["measured"] / one["predicted"] < 2
        else:
            assert one["measured"] == one["predicted"] > 0


def test_a_line_through_points_of_one_is_that_line() -> None:
    found = _line(TINY, "steps", (1, 2, 4), [0.5, 0.7, 1.1])
    assert (found.fixed_seconds, found.each_seconds) == pytest.approx((0.3, 0.2))
    assert found.largest_deviation == pytest.approx(0, abs=1e-9)
    assert Line("", "", [1], [2.0], 1.0, 0.5).largest_deviation == 0.25


def test_what_clients_keep_is_in_a_checkpoint_s_text() -> None:
    few, many = (measure(Point(clients, keep=True)) for clients in (12, 40))
    assert 28 * 90 < many.text_bytes - few.text_bytes < 28 * 140
    assert many.tensors_bytes == few.tensors_bytes
    assert min(many.draw_seconds, many.update_seconds, many.checkpoint_seconds) > 0


@pytest.mark.slow
def test_the_command_writes_what_the_report_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "SIZES", (TINY,))
    monkeypatch.setattr(scale, "POINTS", tuple(Point(count, keep) for keep in (False, True) for count in (12, 40)))
    assert scale.main(["--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "scale.json").read_text())
    assert saved["projected"] == project(saved["lines"][0], saved["servers"])
    assert "| tiny | bytes of rounds |" in scale_markdown(tmp_path / "scale.json")
    assert "Llama, 7B" in projected_markdown(tmp_path / "scale.json")


@pytest.mark.slow
def test_the_committed_projection_is_that_of_the_model_and_its_memory_that_of_the_server() -> None:
    saved = json.loads((ROOT / "docs" / "results" / "scale.json").read_text())
    projected = project(saved["lines"][0], saved["servers"])
    for found, one in zip(projected, saved["projected"], strict=True):
        # The angles of rotary positions are a product, which counts, in transformers 5.17 and none in 5.23.
        about = {name: pytest.approx(value, rel=1e-3) for name, value in one.items() if name.endswith("_seconds")}
        assert found == one | about
    of = {(server["clients"], server["keep"]): server["client_bytes"] for server in saved["servers"]}
    rows = 8 * 16  # of every client's sixteen rows, by number
    assert pytest.approx((of[100_000, False] - of[100, False]) / 99_900 - rows, rel=0.1) == CLIENT_BYTES
    assert pytest.approx((of[10_000, True] - of[1000, True]) / 9000 - rows, rel=0.1) == CLIENT_BYTES + STORED_BYTES
