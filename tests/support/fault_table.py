"""The counts of the faults that the tests have tried, kept in a file and shown as a table in the guide.

`python -m pytest -m slow tests/fed/faults --faults docs/results/faults.json` writes the file, and `python -m
tests.support.fault_table` the table.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from bench.report.markdown import markdown_table, update_document

ROOT = Path(__file__).resolve().parents[2]
COUNTS, GUIDE = ROOT / "docs" / "results" / "faults.json", ROOT / "docs" / "federated.md"
# What happens in the tests whose names begin so.
HAPPENS = {
    "test_a_run_killed_at_many_changes": "killed at a change of its files",
    "test_a_run_killed_again": "killed, and again while it goes on",
    "test_a_killed_overwrite": "killed under `run --overwrite`",
    "test_a_killed_run_is_resumed": "killed under `run`",
    "test_a_run_killed_at_a_random_time": "a process killed at a random time",
    "test_an_interrupted_command": "Ctrl-C or SIGTERM at a change of its files",
    "test_a_run_interrupted_at_a_random_time": "Ctrl-C or SIGTERM at a random time",
    "test_a_run_goes_on_after_a_power_loss": "power lost: flushed files stay, or names without content, or any mix",
    "test_a_run_with_any_damage": "a file flipped, cut, emptied, deleted, doubled or exchanged",
    "test_commands_on_a_damaged_run": "the same under `report`, `noise` and `resume`",
    "test_a_run_goes_on_after_an_error_of_the_disk": "a disk that is full, read-only or fails",
    "test_a_run_whose_files_may_not_grow": "files that may not grow",
    "test_a_run_on_a_disk_that_is_too_small": "a disk that is too small",
}


def table(counts: dict[str, dict[str, int]]) -> str:
    """Return the table of the counts of outcomes by test; raise KeyError for a test whose faults have no name here."""
    found: dict[str, Counter[str]] = {label: Counter() for label in HAPPENS.values()}
    for test, outcomes in counts.items():
        label = next((label for begin, label in HAPPENS.items() if test.startswith(begin)), None)
        if label is None:
            raise KeyError(f"{test} has no name in {Path(__file__).name}")
        found[label].update(outcomes)
    rows = []
    for label, outcomes in found.items():
        wrong = outcomes.pop("WRONG", 0)
        came = "; ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
        rows.append((label, f"{outcomes.total() + wrong:,}", came, str(wrong)))
    return markdown_table(("what happens", "tried", "what comes of it", "lost or wrong"), rows)


if __name__ == "__main__":
    update_document(GUIDE, "faults", table(json.loads(COUNTS.read_text(encoding="utf-8"))))
