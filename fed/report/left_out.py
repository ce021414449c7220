"""The updates of a run that were left out, by reason, and those that were clipped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from fed.types import Row

# The kinds of reasons, each with what the reasons of it hold (`Row.faults`); the first that fits counts.
KINDS = (
    ("too few usable in its round", r"^too few updates"),
    ("sent before", r"the update that it sent for|was sent before|^its reply cannot be used: it is of"),
    ("not trained by its machine", r"^its machine could not train it"),
    ("grew too much", r"^it grew "),
    ("would spoil the server's state", r"^with it "),
    ("not finite", r"NaN or infinity|training loss is -?(nan|inf)"),
    ("another count or weight", r"^it says that it (took|trained|computed)|^its (weight|number of steps) is"),
    ("other modules", r"^its selection|^it dropped modules"),
    ("malformed", r""),
)
UNKNOWN = "unknown: the reason was not saved"
CLIPPED = "clipped and used"
LATE = "no answer in time"


def kind_of(fault: str) -> str:
    """Return the kind of reason for which an update was left out.

    >>> kind_of("its training loss is nan"), kind_of("its m lora_A is (1, 2); (2, 2) would be right")
    ('not finite', 'malformed')
    """
    return next(kind for kind, pattern in KINDS if re.search(pattern, fault))


def counts(row: Row) -> Counter[str]:
    """Return how many updates of a round were left out for each kind of reason, and how many were clipped."""
    skipped, faults, clipped = row.get("skipped", []), row.get("faults", []), row.get("clipped", [])
    found = Counter(map(kind_of, faults))
    found[UNKNOWN] += len(skipped) - len(faults)  # of runs of earlier versions
    found[CLIPPED] += len(clipped)
    found[LATE] += len(row.get("late", []))
    return +found


def left_out_table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return a table, heading first, of how many updates, rounds and clients each kind has; empty if all were used."""
    updates: Counter[str] = Counter()
    rounds: Counter[str] = Counter()
    clients: dict[str, set[int]] = {}
    for row in rows:
        updates += counts(row)
        rounds.update(counts(row).keys())
        for kind, client in _named(row):
            clients.setdefault(kind, set()).add(client)
    if not updates:
        return []
    sent = sum(len(row.get("clients", [])) + len(row.get("late", [])) for row in rows)
    lines: list[tuple[str, ...]] = [(f"of {sent} updates", "updates", "rounds", "clients")]
    for kind in ordered(updates):
        what = kind if kind in (CLIPPED, LATE) else f"left out: {kind}"
        lines.append((what, str(updates[kind]), str(rounds[kind]), str(len(clients[kind]))))
    return lines


def ordered(found: Counter[str]) -> list[str]:
    """Return the kinds that were found in the order of `KINDS`, those that were clipped last."""
    return [kind for kind in (*(kind for kind, _ in KINDS), UNKNOWN, LATE, CLIPPED) if found[kind]]


def _named(row: Row) -> list[tuple[str, int]]:
    skipped, faults = row.get("skipped", []), row.get("faults", [])
    kinds = [kind_of(fault) for fault in faults] or [UNKNOWN] * len(skipped)
    others = [(CLIPPED, client) for client in row.get("clipped", [])]
    return [*zip(kinds, skipped, strict=True), *others, *((LATE, client) for client in row.get("late", []))]
