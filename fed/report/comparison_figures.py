"""The figures of a comparison: accuracy curves with bands, paired differences, noise and cost."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from math import ceil, floor, log10
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from fed.experiments.variants import Variant
from fed.files import write_atomically
from fed.report.comparison import Comparison
from fed.report.figure import Panel, Theme, over_rounds, sheet
from fed.report.summary import COST, NOISE, Metric
from fed.types import measured

# Values of x, and the mean and the standard deviation over seeds at each of them.
Band = tuple[list[float], list[float], list[float]]


def draw(comparison: Comparison, directory: Path) -> list[Path]:
    """Draw accuracy.png, cost.png and, if noise was measured, noise.png to `directory`; return their paths."""
    paths = []
    for name, panels in sheets(comparison).items():
        columns = 2 if len(panels) in (2, 4) else 3
        picture = sheet(panels, size=(5.6, 4.6), columns=columns, shared_legend=True)
        paths.append(write_atomically(directory / f"{name}.png", picture))
    return paths


def sheets(comparison: Comparison) -> dict[str, list[Panel]]:
    """Return the panels of each picture by its name; "noise" is left out if it was not measured."""
    caption = "Accuracy on held-out test data: mean over seeds, ± one standard deviation."
    accuracy = [Panel(caption, partial(_accuracy, comparison=comparison))]
    if any(comparison.paired(variant) for variant in comparison.others):
        caption = "Accuracy less the reference's, paired by seed, with 95 % intervals: across the line is a tie."
        accuracy.append(Panel(caption, partial(_differences, comparison=comparison), legend=False))
    noise = []
    for metric in comparison.metrics(NOISE):
        caption = f"{metric.title.capitalize()} in every round, mean over seeds."
        noise.append(Panel(caption, partial(_noise, comparison=comparison, metric=metric)))
    caption = "Accuracy over all bytes sent so far, up and down."
    cost = [Panel(caption, partial(_accuracy_per_byte, comparison=comparison))]
    for metric in comparison.metrics([name for name in COST if name != "trainable_parameters"]):
        caption = f"{metric.phrase} ({metric.unit}), mean over seeds."
        cost.append(Panel(caption, partial(_bars, comparison=comparison, metric=metric), legend=False))
    return {"accuracy": accuracy} | ({"noise": noise} if noise else {}) | {"cost": cost}


def band(comparison: Comparison, variant: Variant, field: str, scale: float = 1.0) -> Band:
    """Return a field's mean and deviation over seeds, for rounds in which all finished runs of a variant have it."""
    runs = comparison.runs[variant.name].values()
    by_round: dict[int, list[float]] = {}
    for run in runs:
        for row in run.rows:
            if (value := measured(row, field)) is not None:
                by_round.setdefault(row["round"], []).append(scale * value)
    full = {number: values for number, values in by_round.items() if len(values) == len(runs)}
    means = [fmean(values) for values in full.values()]
    deviations = [stdev(values) if len(values) > 1 else 0.0 for values in full.values()]
    return [float(number) for number in full], means, deviations


def _plot_band(axes: Axes, theme: Theme, number: int, label: str, values: Band) -> None:
    x, means, deviations = values
    line = theme.line(number)
    axes.plot(x, means, **line, label=label, linewidth=1.7)
    if any(deviations):
        low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
        axes.fill_between(x, low, high, color=str(line["color"]), alpha=0.15, linewidth=0)


def _last_round(comparison: Comparison) -> int:
    return max(run.rows[-1]["round"] for runs in comparison.runs.values() for run in runs.values())


def _accuracy(axes: Axes, theme: Theme, comparison: Comparison) -> None:
    for number, variant in enumerate(comparison.plan.variants):
        _plot_band(axes, theme, number, variant.label, band(comparison, variant, "accuracy", 100.0))
    over_rounds(axes, _last_round(comparison), "Accuracy on held-out test data", "accuracy (%)")


def _noise(axes: Axes, theme: Theme, comparison: Comparison, metric: Metric) -> None:
    """Draw one noise on a logarithmic axis, which is extended down to 0 if a variant has noise 0."""
    positive: list[float] = []
    none = False
    for number, variant in enumerate(comparison.plan.variants):
        x, means, _ = band(comparison, variant, metric.name)
        axes.plot(x, means, **theme.line(number), label=variant.label, linewidth=1.7)
        positive += [mean for mean in means if mean > 0]
        none = none or min(means, default=1.0) == 0
    if positive:
        _logarithmic(axes, min(positive), max(positive), none)
    over_rounds(axes, _last_round(comparison), metric.title.capitalize(), "Frobenius norm")


def _logarithmic(axes: Axes, low: float, high: float, zero: bool) -> None:
    """Make the y axis logarithmic over whole decades, at least one; with `zero`, add a linear part down to 0."""
    bottom, top = floor(log10(low)), max(ceil(log10(high)), floor(log10(low)) + 1)
    step = max(1, round((top - bottom) / 5))
    decades = [10.0**power for power in range(bottom, top + 1, step)]
    if zero:
        axes.set_yscale("symlog", linthresh=10.0**bottom, linscale=0.7)
        axes.set_yticks([0.0, *decades])
        axes.set_ylim(-0.2 * 10.0**bottom, 10.0**top)
    else:
        axes.set_yscale("log")
        axes.set_yticks(decades)
        axes.set_ylim(10.0**bottom, 10.0**top)
    axes.yaxis.set_minor_locator(NullLocator())


def _differences(axes: Axes, theme: Theme, comparison: Comparison) -> None:
    """Draw the mean difference of each variant with its interval, the first variant on top."""
    numbers = {variant: number for number, variant in enumerate(comparison.plan.variants)}
    shown = [(variant, found) for variant in comparison.others if (found := comparison.paired(variant)) is not None]
    axes.axvline(0, color=theme.grey, linewidth=1)
    for place, (variant, found) in enumerate(shown):
        color = str(theme.line(numbers[variant])["color"])
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
        axes.plot([found.mean], [place], color=color, marker="o", markersize=6)
    axes.set_yticks(range(len(shown)), [variant.label for variant, _ in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_title(f"Accuracy less {comparison.plan.reference.label}'s")
    axes.set_xlabel("points, with 95 % interval")


def _accuracy_per_byte(axes: Axes, theme: Theme, comparison: Comparison) -> None:
    """Draw accuracy over bytes from round 1 on; the axis is logarithmic as methods differ by orders of magnitude."""
    for number, variant in enumerate(comparison.plan.variants):
        _, means, deviations = band(comparison, variant, "accuracy", 100.0)
        _, up, _ = band(comparison, variant, "upload_bytes", 1e-6)
        _, down, _ = band(comparison, variant, "download_bytes", 1e-6)
        sent = list(accumulate(a + b for a, b in zip(up, down, strict=True)))
        _plot_band(axes, theme, number, variant.label, (sent[1:], means[1:], deviations[1:]))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("Accuracy over megabytes sent")
    axes.set_xlabel("megabytes up and down, all clients")
    axes.set_ylabel("accuracy (%)")


def _bars(axes: Axes, theme: Theme, comparison: Comparison, metric: Metric) -> None:
    """Draw a horizontal bar labelled with its mean for each variant, the first variant on top."""
    variants = comparison.plan.variants
    found = [list(comparison.values(variant, metric).values()) for variant in variants]
    means = [fmean(values) if values else 0.0 for values in found]
    colors = [str(theme.line(number)["color"]) for number in range(len(variants))]
    bars = axes.barh(range(len(variants)), means, color=colors, height=0.62)
    axes.bar_label(bars, [f"{mean:.3g}" for mean in means], padding=3, fontsize=9, color=theme.ink)
    axes.set_yticks(range(len(variants)), [variant.label for variant in variants])
    axes.set_ylim(len(variants) - 0.5, -0.5)
    axes.margins(x=0.14)
    axes.set_title(metric.phrase)
    axes.set_xlabel(metric.unit)
