"""Experiment trackers that receive a run's rows besides `rounds.jsonl`: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fed.config import RunConfig, settings_of
from fed.errors import FedError
from fed.types import Row

Log = Callable[[Row], None]

PROJECT = "plora-kernels"


class Tracker(NamedTuple):
    """A tracker: the library it needs, the extra that installs it, and a context manager that yields a `Log`."""

    library: str
    extra: str
    opened: Callable[[RunConfig, Path, int], Any]


def require(names: Sequence[str]) -> None:
    """Raise FedError, naming the extra to install, for the first tracker whose library is not installed."""
    for name in names:
        library, extra, _ = TRACKERS[name]
        if find_spec(library) is None:
            raise FedError(
                f"tracker {name!r} needs {library}, which is not installed: pip install 'plora-kernels[{extra}]'"
            )


@contextmanager
def tracking(config: RunConfig, directory: Path, first: int = 0) -> Iterator[Log]:
    """Within the context, open the run's trackers; yield a function that sends a row to all of them.

    `first` is the round of the first row that will be sent. If the run is resumed, TensorBoard replaces the rows from
    that round on, and the other trackers begin a new run.
    """
    require(config.tracker)
    with ExitStack() as stack:
        logs = [stack.enter_context(TRACKERS[name].opened(config, directory, first)) for name in config.tracker]

        def log(row: Row) -> None:
            for one in logs:
                one(row)

        yield log


def scalars(row: Row) -> dict[str, float]:
    """Return the numbers in a row, without its round, lists, and values that were not measured."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "round" and isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextmanager
def _tensorboard(config: RunConfig, directory: Path, first: int) -> Iterator[Log]:
    """Write event files, with the configuration as text, to `tensorboard/` in the run's directory."""
    tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
    lines = [f"    {key} = {value!r}" for key, value in settings_of(config).items()]
    with tensorboard.SummaryWriter(str(directory / "tensorboard"), purge_step=first or None) as writer:
        writer.add_text("config", "\n".join(lines))

        def log(row: Row) -> None:
            for name, value in scalars(row).items():
                writer.add_scalar(name, value, row["round"])
            writer.flush()

        yield log


@contextmanager
def _wandb(config: RunConfig, directory: Path, first: int) -> Iterator[Log]:
    """Log to a run named after the directory; wandb's own settings, such as `WANDB_MODE`, decide where it is stored."""
    wandb = importlib.import_module("wandb")
    settings = {**settings_of(config), "seed": config.seed}
    name = _run_name(directory)
    run = wandb.init(project=PROJECT, name=name, dir=str(directory), config=settings, reinit="finish_previous")
    try:
        yield lambda row: run.log(scalars(row), step=row["round"])
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


@contextmanager
def _mlflow(config: RunConfig, directory: Path, first: int) -> Iterator[Log]:
    """Log to a run named after the directory; MLflow's own `MLFLOW_TRACKING_URI` decides where it is stored."""
    mlflow = importlib.import_module("mlflow")
    with mlflow.start_run(run_name=_run_name(directory)):
        mlflow.log_params({**settings_of(config), "seed": config.seed})
        yield lambda row: mlflow.log_metrics(scalars(row), step=row["round"])


def _run_name(directory: Path) -> str:
    """Return the last two parts of the run's path; the last one alone is seed-… for all runs of a comparison."""
    return "/".join(directory.resolve().parts[-2:])


TRACKERS = {
    "tensorboard": Tracker("tensorboard", "track", _tensorboard),
    "wandb": Tracker("wandb", "wandb", _wandb),
    "mlflow": Tracker("mlflow", "mlflow", _mlflow),
}
