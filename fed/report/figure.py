"""Drawing panels of one style in a grid, with a light or a dark background, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

_DPI = 130
_STYLES = ("-", "--", "-.", (0, (1, 1.2)))


@dataclass(frozen=True)
class Theme:
    """The colours of a light or a dark background.

    `colors` are those of Okabe and Ito, or lighter shades, which readers with colour vision deficiencies can
    distinguish.
    """

    paper: str
    ink: str
    grey: str
    grid: str
    colors: tuple[str, ...]

    def line(self, number: int) -> dict[str, Any]:
        """Return colour and line style of line `number`; styles distinguish lines when printed without colour."""
        count = len(self.colors)
        style = _STYLES[(number + number // count) % len(_STYLES)]
        return {"color": self.colors[number % count], "linestyle": style}


LIGHT = Theme(
    paper="#FFFFFF",
    ink="#222222",
    grey="#595959",
    grid="#DDDDDD",
    colors=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#595959"),
)
DARK = Theme(
    paper="#16181C",
    ink="#E4E4E4",
    grey="#A8A8A8",
    grid="#34373D",
    colors=("#4FA3E0", "#FF8140", "#2DC79A", "#E39AC4", "#F0B429", "#9AD4F5", "#B8B8B8"),
)


class Panel(NamedTuple):
    """One set of axes with its caption: `draw` draws it, and with `legend` a legend is placed below it."""

    caption: str
    draw: Callable[[Axes, Theme], None]
    legend: bool = True


def sheet(
    panels: Sequence[Panel],
    theme: Theme = LIGHT,
    title: str = "",
    *,
    columns: int = 3,
    size: tuple[float, float] = (4.33, 5.0),
    shared_legend: bool = False,
) -> bytes:
    """Return a PNG of panels in rows of `columns`; `size` is the width and height of a panel in inches.

    With `shared_legend` there is one legend below all panels instead of one for each.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(size[0] * columns, size[1] * rows),
        dpi=_DPI,
        facecolor=theme.paper,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    canvas = FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=12, color=theme.ink)
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(cells, panels, strict=False):
        panel.draw(axes, theme)
        _finish(axes, theme)
        if panel.legend and not shared_legend:  # below the axes a legend hides nothing
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), **_legend_style(theme))
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    if shared_legend:
        _legend_of_all(figure, theme)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def over_rounds(axes: Axes, last_round: int, title: str, measure: str) -> None:
    """Set the title, the label of the y axis, and an x axis for rounds, from 0 to a little beyond the last one."""
    axes.set_title(title)
    axes.set_ylabel(measure)
    axes.set_xlabel("round")
    axes.set_xlim(0, 1.03 * max(1, last_round))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _finish(axes: Axes, theme: Theme) -> None:
    if not axes.images:
        axes.set_facecolor(theme.paper)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", colors=theme.ink, labelcolor=theme.ink)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(theme.ink)
    for spine in axes.spines.values():
        spine.set_color(theme.grey)
    if not axes.images:
        # Bars are horizontal, and grid lines for the y axis would be drawn along them.
        along: Literal["x", "both"] = "x" if axes.containers else "both"
        axes.grid(axis=along, color=theme.grid, linewidth=0.6)


def _legend_style(theme: Theme) -> dict[str, Any]:
    return {"frameon": False, "fontsize": 9.5, "labelcolor": theme.ink}


def _legend_of_all(figure: Figure, theme: Theme) -> None:
    """Place a legend below all panels, with one entry for each label in any of them."""
    entries: dict[Any, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    rows = -(-len(entries) // max(1, int(figure.get_figwidth() / 2.2)))
    columns = max(1, -(-len(entries) // max(1, rows)))  # makes the rows of the legend equally long
    style = _legend_style(theme)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, **style)
