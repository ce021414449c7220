"""The table of the results of `python -m bench.flower`: rounds over Flower on one machine and on several."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness.records import ResultsError
from bench.report.markdown import commit_text, markdown_table, versions_text

NODES = "flower-nodes"


def nodes_markdown(path: Path) -> str:
    """Return the table as Markdown; raise ResultsError if the file lacks a field.

    Predicted is T(M) = Σ_i t_i / M + s: t_i are the clients' own seconds of training over one machine, and s what a
    round takes there beyond them.
    """
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    try:
        machine, measured = saved["environment"], saved["measured"]
        seconds = [median(one["round_seconds"]) for one in measured]
        alone = measured[0]["train_seconds"] / measured[0]["nodes"]
        beyond = seconds[0] - alone
        rows = [
            (
                str(one["nodes"]),
                f"{own:.1f}",
                f"{one['train_seconds'] / one['nodes']:.1f}",
                f"{alone * measured[0]['nodes'] / one['nodes'] + beyond:.1f}",
                f"{one['bytes'] / 1e6:.1f}",
                f"{one['clients_per_second']:.3f}",
                f"{one['ratio']:.2f}",
            )
            for one, own in zip(measured, seconds, strict=True)
        ]
        conditions = (
            f"{machine['cpu_name']}, {machine['cores']} cores; {versions_text(machine['versions'])}; "
            f"{commit_text(saved['commit'])}, {saved['timestamp'][:10]}. {saved['clients']} clients a round of "
            f"{saved['steps']} local steps; `{' '.join(saved['settings'])}`. Medians of "
            f"{len(measured[0]['round_seconds'])} rounds."
        )
    except KeyError as error:
        raise ResultsError(
            f"{path} has no {error.args[0]!r}; `python -m bench.flower` of this version saves it"
        ) from None
    titles = (
        "SuperNodes",
        "a round, s",
        "of training on each, s",
        "predicted, s",
        "MB a round",
        "clients/s",
        "ratio",
    )
    return f"{conditions}\n\n{markdown_table(titles, rows)}\n"
