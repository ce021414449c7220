"""The steps of a run that all commands share: making the base model, playing rounds, training centralised LoRA."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from fed import interruption, methods
from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.data.tables import Split
from fed.errors import FedError, machine_faults
from fed.experiments.trackers import tracking
from fed.models import base_model, saved_base
from fed.models.base_model import Progress
from fed.models.head import head_names
from fed.models.saved_files import DIGESTS, RENEW, write_digests
from fed.models.shared_model import adapted, started
from fed.seeding import ClientRandom
from fed.simulation import checkpoint
from fed.simulation.evaluation import WorkProgress, evaluate_held_out
from fed.simulation.finished import input_digests_of, why_not_finished
from fed.simulation.round_metrics import finite
from fed.simulation.rounds import Executor, first_state
from fed.simulation.run_directory import BASE
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

    `on_event` is passed to `fed.models.base_model.make`. The adapter and the device are checked first, so that an
    error in them does not come after the pretraining.
    """
    model, drawn = base_model.make(config, data, on_event)
    check_adapter(config, model)
    if data.pretrain is not None:
        model.cpu()

        def after_step(step: int, loss: float) -> None:
            interruption.check()
            if not math.isfinite(loss):
                raise FedError(
                    f"model.pretrain_learning_rate is {config.model.pretrain_learning_rate:g}: the loss of step {step} "
                    f"is {loss}; a smaller one would be right"
                )
            if progress is not None:
                progress(step, loss)

        base_model.pretrain(model, data.pretrain, config, after_step)
        base_model.convert(model, config)
    saved_base.save(model, config, directory, drawn)
    return model


def reopen_base(directory: Path, config: RunConfig, label_names: tuple[str, ...] = ()) -> nn.Module:
    """Load the base model of a run that has begun (`fed.models.saved_base.reopen`).

    Raises FedError if the run holds the digest of its base, but the files of that have none. A base that an earlier
    version saved gets its digests here.
    """
    base = directory / BASE
    if not (base / DIGESTS).is_file():
        if input_digests_of(directory) or checkpoint.saved_inputs(directory):
            raise FedError(f"the base model in {str(base)!r} is damaged: {DIGESTS} is missing; {RENEW}")
        model = saved_base.reopen(base, label_names, config)
        write_digests(base)
        return model
    return saved_base.reopen(base, label_names, config)


def check_adapter(config: RunConfig, model: nn.Module) -> None:
    """Raise an error if the run's adapter does not fit the model, or could not be saved; the model is left unchanged.

    It is saved to a temporary directory, because a layer that PEFT would not adapt is to be known before the run. The
    embedded ViT is checked in the dtype that it is converted to after its pretraining.
    """
    if config.model.path is None:
        model = copy.deepcopy(model)
        base_model.convert(model, config)
    with adapted(config, model, head_names(model)) as shared, tempfile.TemporaryDirectory() as directory:
        save_peft(shared.handle, directory)
        factors = {layer.lora_A.dtype for layer in shared.handle.layers.values()}
        if config.execution == "cohort" and {value.dtype for value in shared.head.values()} - factors:
            raise FedError(
                f"adapter.dtype is {config.adapter.dtype!r} and execution 'cohort', which needs factors and head of "
                "one dtype; adapter.dtype = 'float32' or execution = 'sequential' would be right"
            )


def play(
    config: RunConfig,
    data: FederatedData,
    model: nn.Module,
    directory: Path,
    on_round: Callable[[Row], object],
    on_event: Callable[[str], object],
    resume: bool = False,
    on_ready: Callable[[RunConfig], object] | None = None,
    on_progress: WorkProgress | None = None,
    executor: Executor | None = None,
) -> list[Row]:
    """Play the rounds of a run, all or, with `resume`, those after its checkpoint, and return all rows.

    Each new row goes to `on_round` and then to the run's trackers. `on_ready`, `on_progress` and `executor` go to
    `simulate`.
    """
    with ExitStack() as stack:
        track: Callable[[Row], None] | None = None

        def hand_on(row: Row) -> None:
            nonlocal track
            on_round(row)
            if track is None:  # not before: trackers write to the directory, which is in its place with the first row
                track = stack.enter_context(tracking(config, directory, row["round"]))
            track(row)

        names = head_names(model)
        return simulate(
            config,
            data,
            model,
            names,
            directory,
            hand_on,
            on_event,
            resume=resume,
            on_ready=on_ready,
            on_progress=on_progress,
            executor=executor,
        )


def require_local(config: RunConfig) -> None:
    """Raise FedError if a run that is to be played by this process alone names other machines for its clients."""
    if config.engine.name != "local":
        raise FedError(
            f"engine.name is {config.engine.name!r}, and this plays runs on one machine; engine.name = 'local', or "
            "python -m fed run for each run, would be right"
        )


def ended(directory: Path, config: RunConfig) -> bool:
    """Return whether a run is finished and its result is as it was then (`fed.simulation.finished`)."""
    return why_not_finished(directory, config) is None


@contextmanager
def limits(threads: int, matmul_precision: str = "highest") -> Iterator[None]:
    """Within the context, set torch's number of CPU threads (0: keep it) and the precision of float32 products.

    PLoRAErrors and errors of the machine, such as a full disk (`fed.errors.machine_faults`), are raised as FedErrors.
    From then on the process also keeps freed memory for reuse (`fed.training.memory.keep_freed_memory`).
    """
    keep_freed_memory()
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or before)
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        with machine_faults():
            yield
    except PLoRAError as error:
        raise FedError(str(error)) from error
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


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
