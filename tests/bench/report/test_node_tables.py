"""The table of rounds over one machine and several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.harness.records import ResultsError
from bench.report.command import main
from bench.report.node_tables import NODES, nodes_markdown

MEASURED = [
    {"nodes": 1, "round_seconds": [109.0, 110.0, 115.0], "train_seconds": 100.0, "bytes": 2e6},
    {"nodes": 2, "round_seconds": [60.0, 62.0, 90.0], "train_seconds": 104.0, "bytes": 2e6},
]
SAVED: dict[str, Any] = {
    "kind": NODES,
    "timestamp": "2026-11-29T12:00:00",
    "commit": "0" * 40,
    "environment": {"cpu_name": "CPU", "cores": 2, "versions": {"python": "3.11"}},
    "settings": ["threads=1"],
    "clients": 11,
    "steps": 5,
    "measured": [
        one | {"clients_per_second": 11 / own, "ratio": 110 / own} for one, own in zip(MEASURED, (110, 62), strict=True)
    ],
}


def saved(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "nodes.json"
    path.write_text(json.dumps(content))
    return path


def test_a_round_is_predicted_from_that_on_one_machine(tmp_path: Path) -> None:
    text = nodes_markdown(saved(tmp_path, SAVED))
    assert "| 1 | 110.0 | 100.0 | 110.0 | 2.0 | 0.100 | 1.00 |" in text
    assert "| 2 | 62.0 | 52.0 | 60.0 | 2.0 | 0.177 | 1.77 |" in text
    assert "11 clients a round of 5 local steps" in text


def test_the_command_puts_it_into_a_document(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"<!-- {NODES}:begin -->\n<!-- {NODES}:end -->\n")
    assert main([str(saved(tmp_path, SAVED)), "--document", str(document)]) == 0
    assert "| 2 | 62.0 |" in document.read_text()


def test_a_file_that_lacks_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="has no 'steps'"):
        nodes_markdown(saved(tmp_path, {name: value for name, value in SAVED.items() if name != "steps"}))
