"""The picture of a benchmark run: time ÷ base, one panel per op, one row per shape."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.results import BenchmarkRun, Shape

# Colours that stay apart for colour-blind readers (Okabe and Ito), and a marker each for print.
STYLES = {
    "peft": ("#D55E00", "s"),
    "peft-compiled": ("#E69F00", "D"),
    "fused": ("#0072B2", "o"),
}
TITLES = {"forward": "forward", "forward_backward": "forward + backward", "fold": "fold"}
BASES = {"fold": "a copy of W"}


def draw(run: BenchmarkRun, path: Path) -> None:
    """Draw each provider's time ÷ base (dots, interquartile range as bars) and write it as PNG."""
    rows = max(len(run.shapes(op)) for op in run.ops)
    figure = Figure(figsize=(1.6 + 4.2 * len(run.ops), 1.6 + 0.34 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(run.ops), squeeze=False)[0]
    for axes, op in zip(panels, run.ops, strict=True):
        _draw_op(axes, run, op)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.suptitle(_subject(run), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    canvas.print_png(str(partial))
    partial.replace(path)


def _subject(run: BenchmarkRun) -> str:
    rows = sorted({shape.m for shape in run.shapes() if shape.m})
    dtypes = sorted({shape.dtype for shape in run.shapes()})
    return f"{run.machine['device_name']}, {', '.join(dtypes)}, M = {', '.join(map(str, rows))}"


def _draw_op(axes: Axes, run: BenchmarkRun, op: str) -> None:
    shapes = run.shapes(op)
    positions = range(len(shapes))
    for number, (provider, (colour, marker)) in enumerate(STYLES.items()):
        points = [
            (position + 0.18 * (number - 1), entries[provider].ratio_to_base, _spread(run, shape, provider))
            for position, shape in zip(positions, shapes, strict=True)
            if provider in (entries := run.entries.get(shape, {})) and "base" in entries
        ]
        if not points:
            continue
        heights, ratios, spreads = zip(*points, strict=True)
        axes.errorbar(
            ratios, heights, xerr=spreads, fmt=marker, color=colour, label=provider, markersize=5, linewidth=1
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(list(positions), [shape.label for shape in shapes], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel(f"time ÷ {BASES.get(op, 'base matmul')}")
    axes.set_title(TITLES.get(op, op), fontsize=10)


def _spread(run: BenchmarkRun, shape: Shape, provider: str) -> float:
    """Return half the interquartile range in units of the base's time."""
    entries = run.entries[shape]
    return entries[provider].iqr_ms / 2 / entries["base"].time_ms
