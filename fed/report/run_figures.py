"""The figures of a run: its measurements over the rounds, and maps of cosines between modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fed import methods
from fed.config import RunConfig
from fed.errors import FedError
from fed.files import write_atomically
from fed.report.figure import Panel, Theme, over_rounds, sheet
from fed.report.left_out import counts, ordered
from fed.report.tables import population
from fed.simulation.run_directory import Run, read
from fed.types import Row, measured

Array = np.ndarray[Any, np.dtype[np.float64]]
SIMILARITY_PICTURE, FOLDER = "similarity.png", "similarity"
_LEAST_SPAN = 0.05  # smallest colour range, so that a map of cosines close to 0 looks like that

RUN_PICTURE = "report.png"
# The field of a row, the label of its line, and the number of the line's colour.
NOISES = (
    ("agg_noise", "aggregation: new global update from clients' mean", 1),
    ("agg_noise_module", "aggregation, module by module", 4),
    ("init_noise", "initialisation: client's start from global update", 0),
    ("factor_noise", "factors: client's start from its last end", 2),
)
_MEMORY = (("optimizer_bytes", "optimiser state", 0), ("activation_bytes", "activations kept for backward", 1))


def draw(directory: Path) -> Path:
    """Draw a run's panels to `report.png` in its directory and return that path."""
    run = read(directory)
    return write_atomically(directory / RUN_PICTURE, sheet(panels(run), title=headline(run.config)))


def panels(run: Run) -> list[Panel]:
    """Return the panels of a run: accuracy, noise and bytes, and clients and memory if they were measured."""
    found = [
        Panel("Accuracy on held-out test data over the rounds.", partial(_accuracy, run=run)),
        Panel("Noise on effective weights in every round.", partial(_noise, rows=run.rows[1:])),
        Panel("Bytes sent in every round, all its clients together.", partial(_traffic, rows=run.rows[1:])),
    ]
    if any(row.get("client_accuracy") for row in run.rows):
        found.append(Panel("Accuracy client by client over the rounds.", partial(_clients, rows=run.rows)))
    if any(row.get(field) for row in run.rows for field, *_ in _MEMORY):
        found.append(Panel("Memory of a client's training in every round.", partial(_memory, rows=run.rows[1:])))
    if any(map(counts, run.rows)):
        drawn = partial(_left_out, rows=run.rows[1:])
        found.append(Panel("Updates left out or clipped in every round, by reason.", drawn))
    return found


def headline(config: RunConfig) -> str:
    """Return a run's settings in one line: method, task and clients."""
    return f"{methods.find(config.method).title} on {config.data.title}: {population(config)}"


def _accuracy(axes: Axes, theme: Theme, run: Run) -> None:
    known = [(row["round"], 100 * accuracy) for row in run.rows if (accuracy := row["accuracy"]) is not None]
    rounds, percent = zip(*known, strict=True)  # round 0 is always measured
    blue, vermilion, *_ = theme.colors
    axes.plot(rounds, percent, color=blue, marker="o", markersize=3, label=f"federated: {percent[-1]:.1f} %")
    axes.axhline(percent[0], color=theme.grey, linestyle=":", label=f"unadapted: {percent[0]:.1f} %")
    for row, style in zip(run.centralised, ("--", "-."), strict=False):
        reached = 100 * (row["accuracy"] or 0.0)  # it is measured in any case
        label = f"centralised LoRA, {row['steps']} steps: {reached:.1f} %"
        axes.axhline(reached, color=vermilion, linestyle=style, label=label)
    axes.set_ylim(0, 100)
    over_rounds(axes, run.rows[-1]["round"], "Accuracy on held-out test data", "accuracy (%)")


def _noise(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    """Draw all noises on a logarithmic axis; a noise that is 0 in every round has only an entry in the legend."""
    known = [(field, name, number) for field, name, number in NOISES if any(field in row for row in rows)]
    for field, name, number in known or NOISES[:1]:
        points = [(row["round"], value) for row in rows if (value := measured(row, field))]
        label = name if points else f"{name}: 0 in every round"
        if rows and all(measured(row, field) is None for row in rows):
            label = f"{name}: not measured"
        axes.plot(*zip(*points, strict=True) if points else ([], []), **theme.line(number), label=label)
    if any(measured(row, field) for row in rows for field, *_ in known):
        axes.set_yscale("log")
    over_rounds(axes, _last_round(rows), "Noise on effective weights", "Frobenius norm of the difference")


def _traffic(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    rounds = [row["round"] for row in rows]
    for field, name, number in (("download_bytes", "down", 0), ("upload_bytes", "up", 1)):
        megabytes = [measured(row, field) / 1e6 for row in rows]
        axes.plot(rounds, megabytes, **theme.line(number), label=f"{name}, {sum(megabytes):.3g} MB in all")
    axes.set_ylim(bottom=0)
    over_rounds(axes, _last_round(rows), "Bytes in a round, all its clients", "megabytes")


def _clients(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    """Draw the range, the mean and the minimum of the clients' accuracies."""
    known = [(row["round"], values) for row in rows if (values := row.get("client_accuracy"))]
    rounds = [number for number, _ in known]
    percent = [[100 * value for value in values if value is not None] for _, values in known]
    means = [sum(values) / len(values) for values in percent]
    worst = [min(values) for values in percent]
    axes.fill_between(rounds, worst, [max(values) for values in percent], color=theme.colors[0], alpha=0.18, lw=0)
    axes.plot(rounds, means, **theme.line(0), label=f"mean of clients: {means[-1]:.1f} %")
    axes.plot(rounds, worst, **theme.line(1), label=f"worst client: {worst[-1]:.1f} %")
    axes.set_ylim(0, 100)
    over_rounds(axes, _last_round(rows), "Accuracy client by client", "accuracy (%)")


def _memory(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    for field, name, number in _MEMORY:
        points = [(row["round"], value / 1e6) for row in rows if (value := measured(row, field)) is not None]
        if points:
            label = f"{name}, {max(value for _, value in points):.3g} MB at most"
            axes.plot(*zip(*points, strict=True), **theme.line(number), label=label)
    axes.set_ylim(bottom=0)
    over_rounds(axes, _last_round(rows), "Memory of local training", "megabytes")


def _left_out(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    """Draw the numbers of updates that were left out for each kind of reason, and clipped, as lines with marks."""
    rounds, found = [row["round"] for row in rows], [counts(row) for row in rows]
    for number, kind in enumerate(ordered(sum(found, Counter()))):
        of_rounds = [of_one[kind] for of_one in found]
        label = f"{kind}: {sum(of_rounds)} in all"
        axes.plot(rounds, of_rounds, **theme.line(number), marker="o", markersize=3, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    over_rounds(axes, _last_round(rows), "Updates left out or clipped", "updates in a round")


def _last_round(rows: Sequence[Row]) -> int:
    return rows[-1]["round"] if rows else 0


class _Map(NamedTuple):
    """A map to draw: the array in a round's file, its title and the label of its axes.

    `itself` is true if the diagonal holds cosines of modules with themselves, which are 1.
    """

    name: str
    title: str
    axis: str
    itself: bool
    caption: str


_MAPS = (
    _Map("within", "within a client", "module", True, "Cosine of two modules of one client, mean over clients"),
    _Map("across", "from client to client", "module", False, "Cosine of a client's module with another client's, mean"),
    _Map("clients", "same module, two clients", "client", True, "Cosine of a module of two clients, mean over modules"),
)


def draw_similarity(directory: Path) -> Path | None:
    """Draw a run's maps to `similarity.png`, a row for each round; return its path, or None if none were saved."""
    panels = similarity_panels(directory)
    if not panels:
        return None
    return write_atomically(directory / SIMILARITY_PICTURE, sheet(panels, columns=len(_MAPS), size=(4.33, 3.9)))


def similarity_panels(directory: Path) -> list[Panel]:
    """Return three maps for each saved round, in the order of rounds.

    All maps of a kind have the same colour range, ± the largest absolute cosine in them, diagonals of ones excluded.
    """
    rounds = _saved(directory)
    panels = []
    spans = {kind.name: _span([arrays[kind.name] for arrays in rounds.values()], kind.itself) for kind in _MAPS}
    for number, arrays in rounds.items():
        for kind in _MAPS:
            drawn = partial(
                _map,
                values=arrays[kind.name],
                span=spans[kind.name],
                title=f"Round {number}: {kind.title}",
                axis=kind.axis,
                names=arrays["ids"].tolist() if kind.axis == "client" else None,
            )
            panels.append(Panel(f"{kind.caption}; round {number}. Grey: nothing to compare.", drawn, legend=False))
    return panels


def _saved(directory: Path) -> dict[int, dict[str, Array]]:
    """Return the arrays of every `similarity/round-N.npz`, by round; raise FedError for one that is damaged."""
    found = {}
    for path in (directory / FOLDER).glob("round-*.npz"):
        if match := re.fullmatch(r"round-(\d+)\.npz", path.name):
            try:
                with path.open("rb") as file, np.load(file) as arrays:  # np.load leaves a damaged one open
                    found[int(match[1])] = _checked(dict(arrays))
            except Exception as error:  # of a zip file that is damaged, or arrays in it
                raise FedError(f"{str(path)!r} is damaged; without it the report is made without its maps") from error
    return dict(sorted(found.items()))


def _checked(arrays: dict[str, Array]) -> dict[str, Array]:
    """Return the arrays of a round; raise ValueError unless they are square maps of numbers and the clients' ids."""
    maps = [arrays[kind.name] for kind in _MAPS]
    if any(values.ndim != 2 or values.shape[0] != values.shape[1] or values.dtype.kind != "f" for values in maps):
        raise ValueError("a map of similarity should be a square of numbers")
    if arrays["ids"].shape != arrays["clients"].shape[:1]:
        raise ValueError("there should be an id for each client")
    return arrays


def _span(arrays: list[Array], off_diagonal: bool) -> float:
    """Return the largest absolute value in the arrays, or outside their diagonals, but at least `_LEAST_SPAN`."""
    largest = [_LEAST_SPAN]
    for values in arrays:
        counted = values[~np.eye(len(values), dtype=bool)] if off_diagonal else values
        largest += np.abs(counted[np.isfinite(counted)]).tolist()
    return max(largest)


def _map(axes: Axes, theme: Theme, values: Array, span: float, title: str, axis: str, names: list[int] | None) -> None:
    image = axes.imshow(values, cmap="RdBu_r", vmin=-span, vmax=span, interpolation="nearest")
    axes.set_facecolor(theme.grid)
    axes.set_title(title)
    axes.set_xlabel(axis)
    axes.set_ylabel(axis)
    if names is None:
        for ruler in (axes.xaxis, axes.yaxis):
            ruler.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 4, 5, 8, 10]))
    else:
        step = -(-len(names) // 10)
        axes.set_xticks(range(0, len(names), step), [str(name) for name in names[::step]])
        axes.set_yticks(range(0, len(names), step), [str(name) for name in names[::step]])
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, extend="both")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.ink, labelcolor=theme.ink)
