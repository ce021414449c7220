"""The picture of training steps: what a client's step costs as the cohort grows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.results import ResultsError
from bench.simulation.saved import Record, Setting, SimulationRun

# Colours that stay apart for colour-blind readers (Okabe and Ito), and a marker each for print.
STYLES = {
    "base": ("black", "."),
    "peft-loop": ("#D55E00", "s"),
    "vmap": ("#E69F00", "D"),
    "sequential": ("#56B4E9", "^"),
    "cohort": ("#0072B2", "o"),
    "cohort-compiled": ("#009E73", "v"),
}
COLUMNS = 3


def draw_simulation(run: SimulationRun, path: Path) -> None:
    """Draw ms per client and step over the cohort's size, a panel a setting, a line a provider; write a PNG.

    Raises ResultsError where no setting was measured at two sizes.
    """
    curves = {setting: cohorts for setting, cohorts in run.by_setting().items() if len(cohorts) > 1}
    if not curves:
        raise ResultsError("no model was measured at two cohort sizes: there is nothing to draw")
    columns = min(COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.4 * columns, 0.8 + 2.7 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (setting, cohorts) in zip(panels, curves.items(), strict=False):
        _draw_panel(axes, setting, cohorts)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for place, axes in enumerate(panels[: len(curves)]):
        if place % columns == 0:
            axes.set_ylabel("ms per client and step")
        if place + columns >= len(curves):
            axes.set_xlabel("clients in the cohort")
    keys = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=len(keys), frameon=False)
    threads = f", CPU threads: {run.threads}" if run.threads else ""
    figure.suptitle(f"{run.device_name}{threads}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    canvas.print_png(str(partial))
    partial.replace(path)


def _draw_panel(axes: Axes, setting: Setting, cohorts: Mapping[int, Mapping[str, Record]]) -> None:
    for provider, (colour, marker) in STYLES.items():
        points = [
            (size, 1e3 * records[provider]["seconds"] / size)
            for size, records in cohorts.items()
            if records.get(provider, {}).get("status") == "timed"
        ]
        if points:
            line = "--" if provider == "base" else "-"
            axes.plot(*zip(*points, strict=True), line, marker=marker, color=colour, label=provider, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(cohorts), [str(size) for size in cohorts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(linewidth=0.4)
    axes.set_title(setting.label, fontsize=9, loc="left")
