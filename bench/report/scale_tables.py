"""The tables of the results of `python -m bench.scale`: the cost model beside runs, and a server by its clients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness.records import ResultsError
from bench.report.markdown import commit_text, markdown_table, versions_text
from fed.experiments.costs.quantities import seconds, sized
from fed.methods import METHODS

KIND = "scale"
KIB = 1024
_CHECKS = {"bytes": "bytes of rounds", "operations": "operations of a step", "memory": "memory of a step"}


def load_scale(path: Path) -> dict[str, Any]:
    """Return what `python -m bench.scale` saved; raise ResultsError for another file."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(saved, dict) or saved.get("kind") != KIND:
        raise ResultsError(f"{path} is no file of `python -m bench.scale`")
    return saved


def scale_markdown(path: Path) -> str:
    """Return the tables as Markdown; raise ResultsError if the file lacks a field."""
    saved = load_scale(path)
    try:
        parts = [_conditions(saved), checks_table(saved), lines_table(saved), _keeping(saved), servers_table(saved)]
        parts += [_growth(saved)]
    except KeyError as error:
        raise ResultsError(
            f"{path} has no {error.args[0]!r}; `python -m bench.scale` of this version saves it"
        ) from None
    return "\n\n".join(parts) + "\n"


def projected_markdown(path: Path) -> str:
    """Return the table of what the model says of many clients; raise ResultsError if the file lacks a field."""
    rows = []
    for one in load_scale(path)["projected"]:
        rows.append(
            (
                one["model"],
                METHODS[one["method"]].title,
                f"{one['clients']:,}",
                f"{one['per_round']:,}",
                *(sized(one[f"{name}_bytes"], "B") for name in ("round", "updates", "population", "text", "disk")),
                *(seconds(value) for value in one["train_seconds"]),
                seconds(one["network_seconds"]),
                seconds(one["server_seconds"] + one["population_seconds"]),
            )
        )
    titles = ("model", "method", "clients", "a round", "bytes a round", "updates held", "clients, in memory")
    rest = ("checkpoint's text", "clients, on disk", "training on 1", "on 8", "on 64", "network", "server")
    return markdown_table((*titles, *rest), rows)


def checks_table(saved: Mapping[str, Any]) -> str:
    """Return what was compared, a line for each size and kind, with the smallest and largest measured ÷ predicted."""
    rows = []
    for size in saved["sizes"]:
        for what, title in _CHECKS.items():
            found = [one for one in saved["compared"] if (one["size"], one["what"]) == (size["name"], what)]
            ratios = [one["measured"] / one["predicted"] for one in found]
            exact = "equal in all" if all(one["measured"] == one["predicted"] for one in found) else ""
            largest = max(one["measured"] for one in found)
            span = exact or f"{min(ratios):.2f} to {max(ratios):.2f}"
            rows.append((size["name"], title, str(len(found)), f"{largest:.3g}", span))
    return markdown_table(("model", "what", "cases", "largest measured", "measured ÷ predicted"), rows)


def lines_table(saved: Mapping[str, Any]) -> str:
    """Return the straight lines of time by steps and by clients."""
    rows = []
    for line in saved["lines"]:
        fitted = [line["fixed_seconds"] + count * line["each_seconds"] for count in line["counts"]]
        off = max(abs(own - one) / own for own, one in zip(line["seconds"], fitted, strict=True))
        counts = ", ".join(map(str, line["counts"]))
        rows.append(
            (
                line["size"],
                f"{line['of']} {counts}",
                f"{1000 * line['fixed_seconds']:.1f}",
                f"{1000 * line['each_seconds']:.1f}",
                f"{100 * off:.1f} %",
            )
        )
    return markdown_table(("model", "of", "fixed, ms", "each, ms", "largest deviation"), rows)


def servers_table(saved: Mapping[str, Any]) -> str:
    """Return what a server does besides training, by its clients."""
    rows = [
        (
            f"{one['clients']:,}",
            "yes" if one["keep"] else "no",
            f"{one['dealing_seconds']:.1f}",
            *(f"{1000 * one[f'{name}_seconds']:.1f}" for name in ("first", "draw", "update", "checkpoint")),
            f"{one['text_bytes'] / KIB:.1f}",
            f"{one['client_bytes'] / 2**20:.0f}",
        )
        for one in saved["servers"]
    ]
    titles = ("clients", "keep files", "dealing rows, s", "first state, ms", "draw, ms", "next state, ms")
    return markdown_table((*titles, "checkpoint, ms", "its text, KiB", "process grew, MiB"), rows)


def per_client(servers: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return how much a figure grows with a client, between the fewest and the most clients."""
    few, many = (chosen(servers, key=lambda one: one["clients"]) for chosen in (min, max))
    return float((many[name] - few[name]) / (many["clients"] - few["clients"]))


def _growth(saved: Mapping[str, Any]) -> str:
    lines = []
    for keep, title in ((False, "A client"), (True, "A client that keeps a file")):
        own = [one for one in saved["servers"] if one["keep"] == keep]
        least, most = (chosen(one["clients"] for one in own) for chosen in (min, max))
        memory, text = per_client(own, "client_bytes"), per_client(own, "text_bytes")
        draw, update, saving = (1e6 * per_client(own, f"{name}_seconds") for name in ("draw", "update", "checkpoint"))
        lines.append(
            f"{title} adds, between {least:,} and {most:,} clients, {memory:,.0f} bytes to the process, {text:.1f} "
            f"bytes to a checkpoint, and to a round {draw:.2f} µs of drawing, {update:.2f} µs for the next state and "
            f"{saving:.1f} µs of its checkpoint."
        )
    return "\n".join(lines)


def _conditions(saved: Mapping[str, Any]) -> str:
    machine = saved["machine"]
    return (
        f"{machine['device_name']}, one thread; {versions_text(machine['versions'])}; {commit_text(saved['commit'])}, "
        f"{saved['date'][:10]}. Seconds of training are the processor's, a server's the clock's."
    )


def _keeping(saved: Mapping[str, Any]) -> str:
    return (
        f"The preset `digits` with `{' '.join(saved['settings'])}`; clients that keep files took part before, and "
        f"have `{' '.join(saved['keeping'])}`."
    )
