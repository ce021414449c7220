"""The command line of `python -m bench.scale`: it writes `scale.json`, of which `python -m bench.report` makes tables.

Each part is measured in a process of its own, with one thread. A quarter of an hour on a CPU that is idle otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.harness.machine import commit_of, environment, timestamp
from bench.harness.processes import outcomes
from bench.harness.records import ResultsError, write_text
from bench.report.scale_tables import KIND
from bench.scale.checks import check
from bench.scale.models import SIZES, Size
from bench.scale.population import KEEPING, SETTINGS, Point, measure
from bench.scale.projection import project

POINTS = (
    *(Point(clients) for clients in (100, 1000, 10_000, 100_000)),
    *(Point(clients, keep=True) for clients in (1000, 10_000)),
)
SECONDS_EACH = 1800.0


def check_in_one_thread(size: Size) -> dict[str, list[dict[str, Any]]]:
    """Return what `check` does, with one thread of torch."""
    torch.set_num_threads(1)
    return check(size)


def measured(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return the result of each piece of work, in order; raise ResultsError for one that fails."""
    found = []
    for item in items:
        # `outcomes` gives the next item to the same process, whose memory the one before has grown already.
        ((_, outcome),) = outcomes(work, [item], workers=1, seconds_each=SECONDS_EACH)
        if outcome.error is not None:
            raise ResultsError(f"{item} was not measured: {outcome.error}")
        print(item, file=sys.stderr)
        found.append(outcome.value)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description="The cost model against runs.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where scale.json goes")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    commit = commit_of(Path.cwd())
    try:
        checked = measured(check_in_one_thread, SIZES)
        servers = [asdict(server) for server in measured(measure, POINTS)]
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = {
        "kind": KIND,
        "machine": environment(torch.device("cpu"), threads=1),
        "commit": commit,
        "date": timestamp(),
        "sizes": [asdict(size) for size in SIZES],
        "settings": [*SETTINGS],
        "keeping": [*KEEPING],
        "compared": [one for part in checked for one in part["compared"]],
        "lines": [one for part in checked for one in part["lines"]],
        "servers": servers,
        "projected": project(checked[0]["lines"][0], servers),  # the first size is the embedded ViT
    }
    write_text(given.out / "scale.json", json.dumps(found, indent=1) + "\n")
    return 0
