"""The tables and the picture of the cost model beside runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.harness.records import ResultsError
from bench.report.command import main as report
from bench.report.scale_tables import checks_table, lines_table, per_client, projected_markdown, scale_markdown


def saved() -> dict[str, Any]:
    def compared(what: str, predicted: float, measured: float) -> dict[str, Any]:
        return {"size": "tiny", "what": what, "case": "x", "predicted": predicted, "measured": measured}

    def server(clients: int, keep: bool) -> dict[str, Any]:
        names = ("dealing", "digest", "first", "draw", "update", "checkpoint")
        return {
            **{"clients": clients, "keep": keep, "text_bytes": 3 * clients, "client_bytes": 1000 * clients},
            **{"tensors_bytes": 5, **{f"{name}_seconds": 1e-6 * clients for name in names}},
        }

    return {
        "kind": "scale",
        "machine": {"device_name": "Example CPU", "versions": {"torch": "2"}},
        "commit": "0123456789abcdef",
        "date": "2026-01-02T03:04:05",
        "sizes": [{"name": "tiny"}, {"name": "small"}, {"name": "large"}],
        "settings": ["a=1"],
        "keeping": ["b=2"],
        "compared": [
            {**one, "size": size}
            for size in ("tiny", "small", "large")
            for one in (compared("bytes", 10, 10), compared("operations", 7, 7), compared("memory", 10, 8))
        ]
        + [compared("memory", 10, 12)],
        "lines": [
            {
                **{"size": "tiny", "of": of, "counts": [1, 2], "seconds": [0.5, 0.8]},
                **{"fixed_seconds": 0.1, "each_seconds": 0.35},
            }
            for of in ("steps", "clients")
        ],
        "servers": [server(clients, keep) for keep in (False, True) for clients in (100, 1100)],
        "projected": [
            {
                **{"model": "tiny", "method": "flora", "clients": 10_000, "per_round": 100, "round_bytes": 1.5e9},
                **{"updates_bytes": 2e6, "population_bytes": 3e6, "text_bytes": 4e3, "disk_bytes": 5e9},
                **{"network_seconds": 0.5, "population_seconds": 1.0, "server_seconds": 2.0},
                "train_seconds": [7200.0, 900.0, 112.5],
            }
        ],
    }


def test_what_was_compared_says_the_extremes_or_that_all_are_equal() -> None:
    table = checks_table(saved())
    assert "| tiny | bytes of rounds | 1 | 10 | equal in all |" in table
    assert "| tiny | memory of a step | 2 | 12 | 0.80 to 1.20 |" in table


def test_a_line_says_how_far_the_farthest_time_is_from_it() -> None:
    """0.45 for 0.5 and 0.8 for 0.8."""
    assert "| tiny | steps 1, 2 | 100.0 | 350.0 | 10.0 % |" in lines_table(saved())


def test_what_a_client_adds_is_the_slope_from_the_fewest_to_the_most() -> None:
    assert per_client(saved()["servers"][:2], "text_bytes") == 3.0


def test_one_command_writes_both_sections_and_the_picture(tmp_path: Path) -> None:
    results, page, png = (tmp_path / name for name in ("scale.json", "scale.md", "scale.png"))
    results.write_text(json.dumps(saved()))
    page.write_text("".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("scale", "scale-projected")))
    assert report([str(results), "--document", str(page), "--png", str(png)]) == 0
    text = page.read_text()
    assert scale_markdown(results).strip() in text
    assert "| tiny | FLoRA | 10,000 | 100 | 1.50 GB | 2.00 MB | 3.00 MB | 4.00 kB | 5.00 GB |" in text
    assert "| 2.0 h | 15.0 min | 112.5 s | 500.0 ms | 3.0 s |" in projected_markdown(results)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_another_file_and_one_without_a_field_are_said(tmp_path: Path) -> None:
    results = tmp_path / "scale.json"
    results.write_text(json.dumps({"kind": "other"}))
    with pytest.raises(ResultsError, match=r"is no file of `python -m bench.scale`"):
        scale_markdown(results)
    results.write_text(json.dumps({**saved(), "lines": [{}]}))
    with pytest.raises(ResultsError, match=r"has no 'counts'|has no 'fixed_seconds'"):
        scale_markdown(results)
