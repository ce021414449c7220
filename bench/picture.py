"""The picture of a benchmark run: time ÷ base, one panel per pass over one projection, one row per shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.results import BenchmarkRun, Entry, ResultsError

# Colours that stay apart for colour-blind readers (Okabe and Ito), and a marker each for print.
STYLES = {
    "peft": ("#D55E00", "s"),
    "peft-compiled": ("#E69F00", "D"),
    "fused": ("#0072B2", "o"),
}
# The ops drawn; tables alone show the others, whose shapes are their own.
TITLES = {"forward": "forward", "forward_backward": "forward + backward", "fold": "fold"}
BASES = {"forward": "base matmul", "forward_backward": "base matmuls", "fold": "a copy of W"}


def draw(run: BenchmarkRun, path: Path) -> None:
    """Draw each provider's time ÷ base (dots, interquartile range as bars) and write it as PNG.

    Raises ResultsError if none of the drawn ops was measured.
    """
    ops = [op for op in run.ops if op in TITLES]
    if not ops:
        raise ResultsError(f"there is nothing to draw: the picture shows {', '.join(TITLES)} alone")
    labels = list(dict.fromkeys(shape.label for op in ops for shape in run.shapes(op)))
    figure = Figure(figsize=(1.8 + 3.4 * len(ops), 1.6 + 0.3 * len(labels)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(ops), squeeze=False, sharey=True)[0]
    for axes, op in zip(panels, ops, strict=True):
        _draw_op(axes, run, op, labels)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].invert_yaxis()
    keys = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=len(keys), frameon=False)
    figure.suptitle(_subject(run), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    canvas.print_png(str(partial))
    partial.replace(path)


def _subject(run: BenchmarkRun) -> str:
    rows = sorted({shape.m for shape in run.shapes() if shape.m})
    dtypes = sorted({shape.dtype for shape in run.shapes()})
    return f"{run.machine['device_name']}, {', '.join(dtypes)}, M = {', '.join(map(str, rows))}"


def _draw_op(axes: Axes, run: BenchmarkRun, op: str, labels: Sequence[str]) -> None:
    for number, (provider, (colour, marker)) in enumerate(STYLES.items()):
        offset = 0.2 * (number - 1)
        points = [
            (labels.index(shape.label) + offset, entries[provider].ratio_to_base, _spread(entries, provider))
            for shape in run.shapes(op)
            if provider in (entries := run.entries.get(shape, {})) and "base" in entries
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
    axes.set_title(TITLES[op], fontsize=10)


def _spread(entries: Mapping[str, Entry], provider: str) -> float:
    """Return half the interquartile range in units of the base's time."""
    return entries[provider].iqr_ms / 2 / entries["base"].time_ms
