"""A grid of runs: every simulated attack against every defence, with the same seeds, data and base models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fed import config as configuration
from fed.errors import FedError
from fed.experiments.plan import MOST_RUNS, Cell
from fed.experiments.variants import Variant, resolved
from fed.simulation.run_directory import read

NONE = "none"
# Attacks that a rule of aggregation has to withstand, and those that the checks of updates reject by themselves.
AGGREGATED, REJECTED = ("label-flip", "scale", "sign-flip"), ("nan", "shape", "replay")


class Defence(NamedTuple):
    """A way to defend: its name, its title in tables and figures, and its settings."""

    name: str
    title: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of the runs with one attack and one defence: for each seed the accuracy and the counts of updates.

    `sent` are all updates of attackers, `rejected` those of them that were left out, `lost` honest updates that were
    left out, and `clipped` are all updates that were clipped.
    """

    attack: str
    defence: str
    accuracy: dict[int, float]
    sent: dict[int, int]
    rejected: dict[int, int]
    lost: dict[int, int]
    clipped: dict[int, int]


@dataclass(frozen=True)
class Grid:
    """The runs of a grid in order, and the settings that they share."""

    cells: tuple[Cell, ...]
    defences: tuple[Defence, ...]
    seeds: tuple[int, ...]
    source: str
    settings: tuple[str, ...]


def defences(limit: float, share: float) -> Iterator[Defence]:
    """Yield the defences: rules are told the attackers' true `share`; `limit` is `server.max_update_norm`, 0: none."""
    off = "server.max_update_norm=0.0"
    clipping = f"server.max_update_norm={limit!r}"
    yield Defence(NONE, "mean", (off,))
    if limit:
        yield Defence("clipping", f"clipping to {limit:g}", (clipping,))
    yield Defence("median", "median", (off, "server.aggregation=median"))
    yield Defence("trimmed-mean", "trimmed mean", (off, "server.aggregation=trimmed-mean", f"server.trim={share!r}"))
    yield Defence("krum", "Krum", (off, "server.aggregation=krum", f"server.byzantine_share={share!r}"))
    if limit:
        yield Defence("clipping-median", "clipping, median", (clipping, "server.aggregation=median"))


def grid(source: str, settings: Sequence[str] = (), seeds: Sequence[int] = ()) -> Grid:
    """Return the runs of a source with settings: no attack and each of `AGGREGATED` against every defence.

    Those of `REJECTED` are played without a defence. `attack.share`, `attack.factor` and `server.max_update_norm` are
    the source's, seeds those of its table `[compare]` if none are given. Raises FedError if a run is not valid.
    """
    table, asked = configuration.table(source, settings)
    base = configuration.parse(table, where=source)
    share, seeds = base.attack.share, tuple(seeds or asked.seeds)
    if share >= 0.5:
        raise FedError(f"attack.share is {share:g}: no rule withstands half of the clients or more; 0.3 would be right")
    for key, given, usual in (
        ("attack.kind", base.attack.kind, NONE),
        ("server.aggregation", base.server.aggregation, "mean"),
    ):
        if given != usual:
            raise FedError(f"{key} is {given!r}: that is what the runs differ by; {usual!r} would be right")
    chosen = tuple(defences(base.server.max_update_norm, share))
    cells = []
    for seed in seeds:
        for attack in (NONE, *AGGREGATED, *REJECTED):
            for defence in chosen if attack not in REJECTED else chosen[:1]:
                own = (f"attack.kind={attack}", *defence.settings)
                variant = Variant(f"{attack}.{defence.name}", f"{attack}, {defence.title}", own)
                cells.append(Cell(variant, seed, resolved(table, (*own, f"seed={seed}"))))
    if len(cells) > MOST_RUNS:
        raise FedError(f"--seeds asks for {len(cells)} runs; there are at most {MOST_RUNS}")
    return Grid(tuple(cells), chosen, seeds, source, tuple(settings))


def outcomes(played: Grid, directory: Path) -> list[Outcome]:
    """Return what came of all runs of a grid, which have ended."""
    found: dict[str, Outcome] = {}
    for cell in played.cells:
        attack, _, defence = cell.variant.name.partition(".")
        outcome = found.setdefault(cell.variant.name, Outcome(attack, defence, {}, {}, {}, {}, {}))
        rows = read(directory / cell.path).rows
        if (reached := rows[-1]["accuracy"]) is None:
            raise FedError(f"{cell.label} has no accuracy after its last round, so there is nothing to compare")
        outcome.accuracy[cell.seed] = reached
        pairs = [({*row.get("attackers", [])}, {*row.get("skipped", [])}) for row in rows]
        outcome.sent[cell.seed] = sum(len(hostile) for hostile, _ in pairs)
        outcome.rejected[cell.seed] = sum(len(hostile & skipped) for hostile, skipped in pairs)
        outcome.lost[cell.seed] = sum(len(skipped - hostile) for hostile, skipped in pairs)
        outcome.clipped[cell.seed] = sum(len(row.get("clipped", [])) for row in rows)
    return list(found.values())
