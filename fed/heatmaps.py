"""Heat maps of the cosines between modules that a run saved for its first and its last round."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fed.canvas import Panel, Theme, save, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, np.dtype[np.float64]]

PICTURE, FOLDER = "similarity.png", "similarity"
_LEAST_SPAN = 0.05  # a map of cosines all next to 0 should look so


class _Map(NamedTuple):
    """One array of a round's file, its title and what its axes count; `itself` says that its diagonal is all ones."""

    name: str
    title: str
    axis: str
    itself: bool
    caption: str


_MAPS = (
    _Map(
        "within",
        "within a client",
        "module",
        True,
        "Cosine of two modules of one client, mean over clients",
    ),
    _Map(
        "across",
        "from client to client",
        "module",
        False,
        "Cosine of a client's module with another client's, mean",
    ),
    _Map(
        "clients",
        "same module, two clients",
        "client",
        True,
        "Cosine of a module of two clients, mean over modules",
    ),
)


def draw(directory: Path) -> Path | None:
    """Draw a run's maps, a row for each round, to `similarity.png`; return its path, None where none were saved."""
    panels = similarity_panels(directory)
    if not panels:
        return None
    return save(sheet(panels, columns=len(_MAPS), size=(4.33, 3.9)), directory / PICTURE)


def similarity_panels(directory: Path) -> list[Panel]:
    """Return three maps for every round saved, the first round first; none where none were saved.

    Colours span the same cosines in every map of a kind: ± the largest there is, a thing's cosine with itself apart.
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
    """Return the arrays of every `similarity/round-N.npz`, by round."""
    found = {}
    for path in (directory / FOLDER).glob("round-*.npz"):
        if match := re.fullmatch(r"round-(\d+)\.npz", path.name):
            with np.load(path) as arrays:
                found[int(match[1])] = dict(arrays)
    return dict(sorted(found.items()))


def _span(arrays: list[Array], off_diagonal: bool) -> float:
    """Return the largest absolute value there is, or there is off the diagonals."""
    largest = [_LEAST_SPAN]
    for values in arrays:
        counted = values[~np.eye(len(values), dtype=bool)] if off_diagonal else values
        largest += np.abs(counted[np.isfinite(counted)]).tolist()
    return max(largest)


def _map(axes: Axes, theme: Theme, values: Array, span: float, title: str, axis: str, names: list[int] | None) -> None:
    from matplotlib.ticker import MaxNLocator

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
