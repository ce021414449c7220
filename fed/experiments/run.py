"""The steps of a run that all commands share: making the base model, playing rounds, training centralised LoRA."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fed import methods
from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.data.tables import Split
from fed.errors import FedError
from fed.experiments.trackers import tracking
from fed.models import base_model
from fed.models.base_model import Progress, head_names
from fed.models.shared_model import adapted, started
from fed.seeding import ClientRandom
from fed.simulation.checkpoint import last_round
from fed.simulation.evaluation import evaluate_held_out
from fed.simulation.round_metrics import finite
from fed.simulation.rounds import first_state
from fed.simulation.run_directory import ADAPTER, read_rows
from fed.simulation.simulate import simulate
from fed.training.local import Job, train
from fed.training.memory import keep_freed_memory
from fed.types import CentralisedRow, Client, Row
from plora_kernels import PLoRAError, save_peft


def make_base(
    config: RunConfig,
    data: FederatedData,
    directory: Path,
    progress: Progress | None = None,
    on_event: Callable[[str], object] | None = None,
) -> nn.Module:
    """Build the base model, pretrain it if it is the embedded one, and save it to `directory`.

    `on_event` is passed to `fed.models.base_model.build`. The adapter and the device are checked first, so that an
    error in them does not come after the pretraining.
    """
    model = base_model.build(config, data, on_event)
    check_adapter(config, model)
    model.cpu()
    if data.pretrain is not None:
        base_model.pretrain(model, data.pretrain, config, progress)
    base_model.save(model, config, directory)
    return model


def check_adapter(config: RunConfig, model: nn.Module) -> None:
    """Raise an error if the run's adapter does not fit the model, or could not be saved; the model is left unchanged.

    It is saved to a temporary directory, because a layer that PEFT would not adapt is to be known before the run.
    """
    with adapted(config, model, head_names(model)) as shared, tempfile.TemporaryDirectory() as directory:
        save_peft(shared.handle, directory)


def play(
    config: RunConfig,
    data: FederatedData,
    model: nn.Module,
    directory: Path,
    on_round: Callable[[Row], object],
    on_event: Callable[[str], object],
    resume: bool = False,
) -> list[Row]:
    """Play the rounds of a run, all or, with `resume`, those after its checkpoint, and return all rows.

    Each new row goes to `on_round` and then to the run's trackers.
    """
    reached = last_round(directory) if resume else None
    first = reached + 1 if reached else 0  # a run resumed from round 0 yields row 0 again
    with tracking(config, directory, first) as track:

        def hand_on(row: Row) -> None:
            on_round(row)
            track(row)

        return simulate(config, data, model, head_names(model), directory, hand_on, on_event, resume=resume)


def ended(directory: Path, config: RunConfig) -> bool:
    """Return whether a run is finished: it has the row of its last round, and the adapter, which is saved after it."""
    rows = read_rows(directory)
    return bool(rows) and rows[-1]["round"] == config.rounds and (directory / ADAPTER).is_dir()


@contextmanager
def limits(threads: int) -> Iterator[None]:
    """Within the context, set torch's number of CPU threads (0: keep it) and turn PLoRAErrors into FedErrors.

    From then on the process also keeps freed memory for reuse (`fed.training.memory.keep_freed_memory`).
    """
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    except PLoRAError as error:
        raise FedError(str(error)) from error
    finally:
        torch.set_num_threads(before)


def centralised(
    config: RunConfig, data: FederatedData, model: nn.Module, head_names: Sequence[str], steps: int
) -> CentralisedRow:
    """Train LoRA of rank R for `steps` steps on all clients' samples together, and return its row.

    The adapter starts from the same values as in the federated run; optimiser, learning rate and batch size are the
    run's. The row holds the metrics of `fed.simulation.evaluation.evaluate_held_out`, steps and train_seconds. The
    model is restored at the end.
    """
    with adapted(config, model, head_names) as shared:
        data = data.to(shared.device)
        pool = Split.joined(data.clients)
        client = Client(id=len(data.clients), rank=config.adapter.rank, n_samples=len(pool))
        rng = ClientRandom(config.seed, 0, client.id)
        server = first_state(shared, config)
        start = methods.find("fedit").start(server, client, rng)
        began = time.perf_counter()
        job = Job(client, start, server.head, pool, steps, config.train.learning_rate, rng)
        with started(shared, start, server.head):
            train(shared, job, config.train)
        train_seconds = time.perf_counter() - began
        metrics = evaluate_held_out(shared.model, data)
    return {**finite(metrics), "steps": steps, "train_seconds": train_seconds}
