"""The outcome of a grid of attacks and defences: tables, a picture, and the files that hold them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fed.experiments.attack_grid import AGGREGATED, NONE, REJECTED, Grid, Outcome
from fed.files import write_atomically
from fed.report.figure import Panel, Theme, sheet
from fed.report.tables import Table, local_work, markdown_table, population

JSON, MARKDOWN, PICTURE = "attacks.json", "attacks.md", "attacks.png"
TITLES = {NONE: "no attack", "nan": "NaN", "shape": "wrong shape"}


def title_of(attack: str) -> str:
    """Return an attack's name in tables and figures."""
    return TITLES.get(attack, attack)


def accuracy_table(grid: Grid, found: Sequence[Outcome]) -> Table:
    """Return accuracy in per cent, mean ± deviation over seeds: a line for each attack, a column for each defence."""
    by_name = {(one.attack, one.defence): one for one in found}
    lines: Table = [("accuracy (%)", *(defence.title for defence in grid.defences))]
    for attack in (NONE, *AGGREGATED):
        cells = (_spread(by_name[attack, defence.name].accuracy) for defence in grid.defences)
        lines.append((title_of(attack), *cells))
    return lines


def rejected_table(found: Sequence[Outcome]) -> Table:
    """Return for each attack, without a defence: attackers' updates, how many are rejected, honest ones, accuracy."""
    lines: Table = [("without a defence", "attackers' updates", "rejected", "honest rejected", "accuracy (%)")]
    for one in found:
        if one.attack in REJECTED and one.defence == NONE:
            counts = (str(sum(column.values())) for column in (one.sent, one.rejected, one.lost))
            lines.append((title_of(one.attack), *counts, _spread(one.accuracy)))
    return lines


def _spread(accuracy: Mapping[int, float]) -> str:
    percent = [100 * value for value in accuracy.values()]
    return f"{fmean(percent):.1f} ± {stdev(percent):.1f}" if len(percent) > 1 else f"{fmean(percent):.1f}"


def as_markdown(grid: Grid, found: Sequence[Outcome]) -> str:
    """Return the grid as Markdown: command, what all runs share, tables and the picture."""
    config, seeds = grid.cells[0].config, "1 seed" if len(grid.seeds) == 1 else f"{len(grid.seeds)} seeds"
    words = ["python", "-m", "fed", "attacks", grid.source, "--seeds", ",".join(map(str, grid.seeds))]
    words += ["--set", *grid.settings] if grid.settings else []
    shared = (
        f"{population(config)}; {config.rounds} rounds of {local_work(config)}; {seeds}. "
        f"{config.attack.share:.0%} of the clients attack, with a factor of {config.attack.factor:g}; the rules are "
        "told that share."
    )
    return "\n\n".join(
        [
            f"# Attacks and defences on {config.data.title}",
            shared,
            f"```\n{shlex.join(words)}\n```",
            markdown_table(accuracy_table(grid, found)),
            markdown_table(rejected_table(found)),
            f"![accuracy by attack and defence]({PICTURE})\n",
        ]
    )


def as_json(grid: Grid, found: Sequence[Outcome]) -> dict[str, Any]:
    """Return the grid as values for JSON."""
    config = grid.cells[0].config
    return {
        "source": grid.source,
        "settings": list(grid.settings),
        "seeds": list(grid.seeds),
        "share": config.attack.share,
        "factor": config.attack.factor,
        "defences": [defence._asdict() for defence in grid.defences],
        "outcomes": [asdict(one) for one in found],
    }


def publish(grid: Grid, found: Sequence[Outcome], directory: Path) -> list[Path]:
    """Write the grid's picture, `attacks.json` and `attacks.md`; return their paths."""
    panel = Panel("Accuracy by attack and defence.", partial(_heat_map, grid=grid, found=found), legend=False)
    wide = 1.6 + 1.15 * len(grid.defences), 1.4 + 0.62 * (1 + len(AGGREGATED))
    return [
        write_atomically(directory / PICTURE, sheet([panel], size=wide)),
        write_atomically(directory / JSON, json.dumps(as_json(grid, found), indent=2, ensure_ascii=False) + "\n"),
        write_atomically(directory / MARKDOWN, as_markdown(grid, found)),
    ]


def _heat_map(axes: Axes, theme: Theme, grid: Grid, found: Sequence[Outcome]) -> None:
    """Draw mean accuracy as shades from 0 to 100 %, with its number in each cell."""
    attacks, by_name = (NONE, *AGGREGATED), {(one.attack, one.defence): one for one in found}
    values = np.array(
        [[100 * fmean(by_name[attack, own.name].accuracy.values()) for own in grid.defences] for attack in attacks]
    )
    axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 60 else "#222222"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=11)
    axes.set_xticks(range(len(grid.defences)), [own.title.replace(", ", ",\n") for own in grid.defences])
    axes.set_yticks(range(len(attacks)), [title_of(attack) for attack in attacks])
    axes.tick_params(length=0)
    share = grid.cells[0].config.attack.share
    axes.set_title(f"Accuracy (%) with {share:.0%} of clients hostile")
    axes.set_xlabel("what the server does")
