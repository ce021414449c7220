"""A run's parts, put together in the same way by every command: data, base model, rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed.allocator import keep_freed_memory
from fed.errors import FedError
from fed.report import read_rows
from fed.rundir import ADAPTER

if TYPE_CHECKING:
    from torch import nn

    from fed.config import RunConfig
    from fed.data import FederatedData

Row = dict[str, Any]
# Called with the steps done and the last loss while a base model is trained.
Progress = Callable[[int, float], object]


def make_base(config: RunConfig, data: FederatedData, directory: Path, progress: Progress | None = None) -> nn.Module:
    """Build the base model, train it where it is the embedded one, and save it to `directory`.

    An adapter that does not fit the model, or a device that is not there, shows before any training.
    """
    from fed import models

    model = models.build(config, data)
    check_adapter(config, model)
    model.cpu()
    if data.pretrain is not None:
        models.pretrain(model, data.pretrain, config, progress)
    models.save(model, config, directory)
    return model


def check_adapter(config: RunConfig, model: nn.Module) -> None:
    """Raise where the run's adapter does not fit the model; the model is left as it was."""
    from fed.local import adapted
    from fed.models import head_names

    with adapted(config, model, head_names(model)):
        pass


def play(
    config: RunConfig,
    data: FederatedData,
    model: nn.Module,
    directory: Path,
    on_round: Callable[[Row], object],
    on_event: Callable[[str], object],
    resume: bool = False,
) -> list[Row]:
    """Run the rounds in `directory`, all or those after its checkpoint; rows go to `on_round`, then to trackers."""
    from fed.checkpoint import last_round
    from fed.models import head_names
    from fed.simulate import simulate
    from fed.trackers import tracking

    reached = last_round(directory) if resume else None
    first = reached + 1 if reached else 0  # row 0 is played anew
    with tracking(config, directory, first) as track:

        def hand_on(row: Row) -> None:
            on_round(row)
            track(row)

        return simulate(config, data, model, head_names(model), directory, hand_on, on_event, resume=resume)


def ended(directory: Path, config: RunConfig) -> bool:
    """Return whether a run went to its end: every round is there, and the adapter that is saved after the last."""
    rows = read_rows(directory)
    return bool(rows) and rows[-1]["round"] == config.rounds and (directory / ADAPTER).is_dir()


@contextmanager
def limits(threads: int) -> Iterator[None]:
    """Let torch use so many threads inside, or as many as it likes if 0; FedError for what does not fit a layer.

    The process keeps the memory it frees from here on.
    """
    import torch

    from plora_kernels import PLoRAError

    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    except PLoRAError as error:
        raise FedError(str(error)) from error
    finally:
        torch.set_num_threads(before)
