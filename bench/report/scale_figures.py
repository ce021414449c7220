"""The picture of the results of `python -m bench.scale`: the cost model beside runs, and a server by its clients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fed.files import replacing

# Colours that colour-blind readers can distinguish (Okabe and Ito), and a marker each for print.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
_WHAT = {"bytes": "bytes", "operations": "operations", "memory": "memory"}
_SERVER = {"draw": "drawing", "update": "next state", "checkpoint": "checkpoint"}


def draw_scale(saved: Mapping[str, Any], path: Path) -> None:
    """Draw measured by predicted figures, time by local steps, and a server's time by its clients; write it as PNG."""
    figure = Figure(figsize=(13.0, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_compared(left, saved)
    _draw_lines(middle, saved)
    _draw_servers(right, saved)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _draw_compared(axes: Axes, saved: Mapping[str, Any]) -> None:
    everything = [one[side] for one in saved["compared"] for side in ("predicted", "measured")]
    span = [min(everything) / 2, max(everything) * 2]
    axes.plot(span, span, color="grey", linewidth=0.8)
    for (what, title), (colour, marker) in zip(_WHAT.items(), _STYLES, strict=True):
        own = [one for one in saved["compared"] if one["what"] == what]
        predicted, measured = ([one[side] for one in own] for side in ("predicted", "measured"))
        axes.plot(predicted, measured, marker, color=colour, markerfacecolor="none", label=title)
    axes.set(xscale="log", yscale="log", xlabel="predicted", ylabel="measured", title="The model and runs")
    axes.legend(frameon=False)


def _draw_lines(axes: Axes, saved: Mapping[str, Any]) -> None:
    for size, (colour, marker) in zip(saved["sizes"], _STYLES, strict=True):
        for line in (one for one in saved["lines"] if one["size"] == size["name"]):
            filled = colour if line["of"] == "steps" else "none"
            counts = line["counts"]
            fitted = [line["fixed_seconds"] + count * line["each_seconds"] for count in counts]
            axes.plot(counts, fitted, color=colour, linewidth=0.8, linestyle="-" if line["of"] == "steps" else ":")
            label = size["name"] if line["of"] == "steps" else None
            axes.plot(counts, line["seconds"], marker, color=colour, markerfacecolor=filled, label=label)
    axes.set(xscale="log", yscale="log", xlabel="local steps (filled) or clients (open)", title="Training")
    axes.set_ylabel("processor seconds")
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()
    axes.legend(frameon=False)


def _draw_servers(axes: Axes, saved: Mapping[str, Any]) -> None:
    for (name, title), (colour, marker) in zip(_SERVER.items(), _STYLES, strict=True):
        for keep in (False, True):
            own = [one for one in saved["servers"] if one["keep"] == keep]
            milliseconds = [1000 * one[f"{name}_seconds"] for one in own]
            style, filled = (":", "none") if keep else ("-", colour)
            label = None if keep and name != "checkpoint" else f"{title}, clients keep files" if keep else title
            axes.plot(
                *([one["clients"] for one in own], milliseconds), marker + style, color=colour,
                markerfacecolor=filled, linewidth=0.8, label=label,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="ms a round", title="A server, outside of training")
    axes.set_ylim(bottom=1e-5)  # room for the legend
    axes.legend(frameon=False, loc="lower right")
