"""Pictures of saved results: time ÷ base by shape, a client's step by the cohort's size, means by kept run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.cases import MAIN_OPS
from bench.harness.records import ResultsError
from bench.report.history import HistoryEntry, Mean, by_device, means
from bench.report.runs import Providers, Run, facts_of, timed
from bench.report.simulation_tables import Setting, by_setting
from bench.report.suite_tables import case_label, rows_and_dtypes
from bench.report.titles import TITLES
from fed.files import replacing

# Colours that colour-blind readers can distinguish (Okabe and Ito), and a marker each for print.
SIMULATION_STYLES = {
    "base": ("black", "."),
    "peft-loop": ("#D55E00", "s"),
    "vmap": ("#E69F00", "D"),
    "sequential": ("#56B4E9", "^"),
    "cohort": ("#0072B2", "o"),
    "cohort-compiled": ("#009E73", "v"),
}
SUITE_STYLES = {"peft": ("#D55E00", "s"), "peft-compiled": ("#E69F00", "D"), "fused": ("#0072B2", "o")}
COLUMNS = 3
# The ops that are drawn, because they are measured at every shape, and the divisor of each; tables show the others.
BASES = {"forward": "base matmul", "forward_backward": "base matmuls", "fold": "a copy of W"}


def draw(run: Run, path: Path) -> None:
    """Draw each provider's time ÷ base (dots, interquartile range as bars) and write it as PNG.

    Raises ResultsError if none of the drawn ops was measured.
    """
    ops = [op for op in run.ops if op in BASES]
    if not ops:
        raise ResultsError(f"there is nothing to draw: the picture shows {', '.join(BASES)} alone")
    labels = list(dict.fromkeys(case_label(facts_of(providers)) for op in ops for providers in run.cases(op)))
    figure = Figure(figsize=(1.8 + 3.4 * len(ops), 1.6 + 0.3 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(ops), squeeze=False, sharey=True)[0]
    for axes, op in zip(panels, ops, strict=True):
        _draw_op(axes, run, op, labels)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].invert_yaxis()
    rows, dtypes = rows_and_dtypes(run)
    figure.suptitle(f"{run.device_name}, {dtypes}, M = {rows}", fontsize=10)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, with one legend for all its panels below them."""
    keys: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        keys |= dict(zip(labels, handles, strict=True))
    figure.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=len(keys), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def _draw_op(axes: Axes, run: Run, op: str, labels: Sequence[str]) -> None:
    for number, (provider, (colour, marker)) in enumerate(SUITE_STYLES.items()):
        offset = 0.2 * (number - 1)
        points = [
            # Half the interquartile range, in units of the base's time.
            (labels.index(case_label(one)) + offset, one["ratio_to_base"], one["iqr_ms"] / 2 / base["time_ms"])
            for providers in run.cases(op)
            if (one := timed(providers, provider)) and (base := timed(providers, "base"))
        ]
        if not points:
            continue
        heights, ratios, spreads = zip(*points, strict=True)
        axes.errorbar(
            ratios, heights, xerr=spreads, fmt=marker, color=colour, label=provider, markersize=5, linewidth=1
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel(f"time ÷ {BASES[op]}")
    axes.set_title(TITLES[op].short, fontsize=10)


def draw_history(runs: Sequence[HistoryEntry], path: Path) -> None:
    """Draw the means over the runs, a row of panels per device and one panel per main op, and write a PNG."""
    devices = by_device(runs)
    figure = Figure(figsize=(11, 0.8 + 3.0 * len(devices)), layout="constrained")
    panels = figure.subplots(len(devices), len(MAIN_OPS), squeeze=False)
    for row, (device, own) in zip(panels, devices.items(), strict=True):
        for axes, op in zip(row, MAIN_OPS, strict=True):
            _draw_means(axes, means(own, op))
            title = TITLES[op].short
            axes.set_title(f"{title}, {device}" if op == MAIN_OPS[0] else title, fontsize=9, loc="left")
        row[0].set_ylabel("fused time ÷")
    _write(figure, path)


def _draw_means(axes: Axes, points: Sequence[Mean]) -> None:
    places = list(range(len(points)))
    axes.plot(places, [point.to_base for point in points], marker="o", color="#0072B2", label="÷ base")
    axes.plot(places, [point.to_peft for point in points], marker="s", color="#D55E00", label="÷ PEFT")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(places, [point.run.name for point in points], rotation=30, ha="right", fontsize=7)
    axes.grid(axis="y", linewidth=0.4)


def draw_simulation(run: Run, path: Path) -> None:
    """Draw ms per client and step over the cohort's size, a panel per setting and a line per provider; write a PNG.

    Raises ResultsError if no setting was measured at two sizes.
    """
    curves = {setting: cohorts for setting, cohorts in by_setting(run).items() if len(cohorts) > 1}
    if not curves:
        raise ResultsError("no model was measured at two cohort sizes: there is nothing to draw")
    columns = min(COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.4 * columns, 0.8 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for place, (axes, (setting, cohorts)) in enumerate(zip(panels, curves.items(), strict=False)):
        _draw_setting(axes, setting, cohorts)
        if place % columns == 0:
            axes.set_ylabel("ms per client and step")
        if place + columns >= len(curves):
            axes.set_xlabel("clients in the cohort")
    threads = f", CPU threads: {run.threads}" if run.threads else ""
    figure.suptitle(f"{run.device_name}{threads}", fontsize=10)
    _write(figure, path)


def _draw_setting(axes: Axes, setting: Setting, cohorts: Mapping[int, Providers]) -> None:
    for provider, (colour, marker) in SIMULATION_STYLES.items():
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
