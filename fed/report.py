"""What a run's files say: its rows read back, its result as a table."""

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
    from fed.config import RunConfig

Row = dict[str, Any]

CENTRALISED = "centralised.json"


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
    rows = read_rows(directory)
    if not rows:
        raise FedError(f"{str(directory / ROUNDS)!r} holds no rows: the run ended before its first")
    path = directory / CENTRALISED
    centralised = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return Run(configuration.load(directory / CONFIG), rows, centralised)


def read_rows(directory: Path) -> list[Row]:
    """Return the rows of a run's file, without a last line cut off in mid-writing; none where there is no file."""
    try:
        *lines, _ = (directory / ROUNDS).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def summary(run: Run) -> list[tuple[str, ...]]:
    """Return a table, its heading first: accuracy before and after with the gain, and what centralised LoRA gains."""
    config, rounds = run.config, run.rows[-1]["round"]
    federated = f"{method_name(config.method)}, {rounds} rounds × {local_work(config)}"
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


def memory_in_use(run: Run) -> str:
    """Say how much memory a run took, in one sentence; nothing where it was not measured."""
    peaks = [row["peak_memory_bytes"] for row in run.rows if row.get("peak_memory_bytes")]
    return f"At most {max(peaks) / 1e6:.0f} MB of memory were in use." if peaks else ""


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


def method_name(method: str) -> str:
    """Return a method's name as its paper writes it."""
    from fed import methods

    return methods.find(method).title


def local_work(config: RunConfig) -> str:
    """Say how long a client trains in a round."""
    train = config.train
    if train.local_epochs:
        return f"{train.local_epochs:g} local epochs"
    if train.client_steps:
        return f"{min(train.client_steps)} to {max(train.client_steps)} local steps"
    return f"{train.local_steps} local steps"


def population(config: RunConfig) -> str:
    """Describe the clients in a few words: how many, how skewed, of what ranks."""
    clients = config.clients
    skew = "iid" if clients.dirichlet_alpha == "iid" else f"Dirichlet {clients.dirichlet_alpha:g}"
    ranks = f"ranks {', '.join(str(rank) for rank in sorted(set(clients.ranks[: clients.count])))}"
    if clients.memory_mib:
        ranks = "ranks by memory"
    return f"{clients.count} clients, {clients.per_round} a round, {skew}, {ranks} of R = {config.adapter.rank}"


def task_name(config: RunConfig) -> str:
    """Name the task in a few words."""
    return config.data.title
