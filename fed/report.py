"""What a run's files say: its rows read back, and the picture of accuracy, noise and bytes over rounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed import config as configuration
from fed.errors import FedError
from fed.rundir import CONFIG, ROUNDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fed.config import RunConfig

Row = dict[str, Any]

PICTURE, CENTRALISED = "report.png", "centralised.json"
METHOD_NAMES = {"fed-plora": "Fed-PLoRA", "fedit": "FedIT"}

# Okabe and Ito's colours, told apart by people of every colour vision; line styles tell them apart without colour.
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#595959"
_INK = "#222222"


@dataclass(frozen=True)
class Run:
    """A run's directory, read: its configuration, its rows (row 0 first), and what centralised LoRA reached.

    `centralised` holds rows of steps, accuracy (0 … 1), loss and train_seconds; it is empty where it was left out.
    """

    config: RunConfig
    rows: list[Row]
    centralised: list[Row]

    @property
    def gain_points(self) -> float:
        """Accuracy of the last round less that of the unadapted model, in percentage points."""
        return self.gain_of(self.rows[-1])

    def gain_of(self, row: Row) -> float:
        """Accuracy of `row` less that of the unadapted model, in percentage points."""
        return 100 * float(row["accuracy"] - self.rows[0]["accuracy"])


def read(directory: Path) -> Run:
    """Read a run's files; a last line cut off in mid-writing is left out. Raises FedError where there is no run."""
    for name in (CONFIG, ROUNDS):
        if not (directory / name).is_file():
            raise FedError(f"{str(directory)!r} is not a run's directory: there is no {name} in it")
    *lines, _ = (directory / ROUNDS).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines]
    if not rows:
        raise FedError(f"{str(directory / ROUNDS)!r} holds no rows: the run ended before its first")
    path = directory / CENTRALISED
    centralised = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return Run(configuration.load(directory / CONFIG), rows, centralised)


def summary(run: Run) -> list[tuple[str, ...]]:
    """Return a table, its heading first: accuracy before and after with the gain, and what centralised LoRA gains."""
    config, rounds = run.config, run.rows[-1]["round"]
    federated = f"{METHOD_NAMES[config.method]}, {rounds} rounds × {config.train.local_steps} local steps"
    lines: list[tuple[str, ...]] = [
        (f"test data: {task_name(config)}", "accuracy", "gain", "ratio"),
        ("unadapted model", percent(run.rows[0]), "", ""),
        (federated, percent(run.rows[-1]), f"{run.gain_points:+.1f} points", ""),
    ]
    for row in run.centralised:
        gain = run.gain_of(row)
        ratio = f"{run.gain_points / gain:.2f}" if gain > 0 else "—"
        lines.append((f"centralised LoRA, {row['steps']} steps", percent(row), f"{gain:+.1f} points", ratio))
    return lines


def markdown(run: Run) -> str:
    """Return the summary as a Markdown table."""
    heading, *lines = summary(run)
    rule = ("---", *["---:"] * (len(heading) - 1))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heading, rule, *lines))


def percent(row: Row) -> str:
    """Return a row's accuracy as text."""
    return f"{100 * row['accuracy']:.1f} %"


def write_centralised(directory: Path, rows: Sequence[Row]) -> None:
    """Write what centralised LoRA reached, one object for each number of steps, beside the run's rounds."""
    temporary = directory / f"{CENTRALISED}.tmp"
    temporary.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / CENTRALISED)


def draw(directory: Path) -> Path:
    """Draw a run's accuracy, noise and bytes over its rounds to `report.png` in its directory; return that path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    run = read(directory)
    figure = Figure(figsize=(13, 5), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.12))
    canvas = FigureCanvasAgg(figure)
    accuracy, noise, traffic = figure.subplots(1, 3)
    figure.suptitle(_headline(run.config), fontsize=12, color=_INK)
    _draw_accuracy(accuracy, run)
    _draw_noise(noise, run.rows[1:])
    _draw_traffic(traffic, run.rows[1:])
    for axes in (accuracy, noise, traffic):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        _finish(axes, last_round=run.rows[-1]["round"])
    path, temporary = directory / PICTURE, directory / f"{PICTURE}.tmp"
    with temporary.open("wb") as file:
        canvas.print_png(file)
    temporary.replace(path)
    return path


def _headline(config: RunConfig) -> str:
    clients = config.clients
    skew = "iid" if clients.dirichlet_alpha == "iid" else f"Dirichlet {clients.dirichlet_alpha:g}"
    ranks = ", ".join(str(rank) for rank in sorted(set(clients.ranks[: clients.count])))
    return (
        f"{METHOD_NAMES[config.method]} on {task_name(config)}: {clients.count} clients, {clients.per_round} a round, "
        f"{skew}, ranks {ranks} of R = {config.adapter.rank}"
    )


def task_name(config: RunConfig) -> str:
    """Name the task in a few words: the digits and their shift, or the JSONL file."""
    if config.data.path is not None:
        return Path(config.data.path).name
    turned = {"rotate90": "turned by 90°", "rotate180": "turned by 180°", "invert": "inverted", "none": "undisturbed"}
    return f"digits {turned[config.data.shift]}"


def _draw_accuracy(axes: Axes, run: Run) -> None:
    percent = [100 * row["accuracy"] for row in run.rows]
    rounds = [row["round"] for row in run.rows]
    axes.plot(rounds, percent, color=_BLUE, marker="o", markersize=3, label=f"federated: {percent[-1]:.1f} %")
    axes.axhline(percent[0], color=_GREY, linestyle=":", label=f"unadapted: {percent[0]:.1f} %")
    for row, style in zip(run.centralised, ("--", "-."), strict=False):
        reached = 100 * row["accuracy"]
        axes.axhline(
            reached, color=_VERMILION, linestyle=style, label=f"centralised LoRA, {row['steps']} steps: {reached:.1f} %"
        )
    axes.set_ylim(0, 100)
    axes.set_title("Accuracy on held-out test data")
    axes.set_ylabel("accuracy (%)")


def _draw_noise(axes: Axes, rows: Sequence[Row]) -> None:
    """Both noises on a logarithmic axis; a noise that is zero throughout has no place there and says so."""
    for field, name, color, style in (
        ("agg_noise", "aggregation: new global update from clients' mean", _VERMILION, "-"),
        ("init_noise", "initialisation: client's start from global update", _BLUE, "--"),
    ):
        points = [(row["round"], row[field]) for row in rows if row[field]]
        label = name if points else f"{name}: 0 in every round"
        axes.plot(*zip(*points, strict=True) if points else ([], []), color=color, linestyle=style, label=label)
    if any(row["agg_noise"] or row["init_noise"] for row in rows):
        axes.set_yscale("log")
    axes.set_title("Noise on effective weights")
    axes.set_ylabel("Frobenius norm of the difference")


def _draw_traffic(axes: Axes, rows: Sequence[Row]) -> None:
    rounds = [row["round"] for row in rows]
    for field, name, color, style in (
        ("download_bytes", "down", _BLUE, "-"),
        ("upload_bytes", "up", _VERMILION, "--"),
    ):
        megabytes = [row[field] / 1e6 for row in rows]
        axes.plot(rounds, megabytes, color=color, linestyle=style, label=f"{name}, {sum(megabytes):.3g} MB in all")
    axes.set_ylim(bottom=0)
    axes.set_title("Bytes in a round, all its clients")
    axes.set_ylabel("megabytes")


def _finish(axes: Axes, last_round: int) -> None:
    axes.set_xlabel("round")
    axes.set_xlim(0, 1.03 * max(1, last_round))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9.5, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # below: hides nothing
