"""A whole federated run: play its rounds and write its files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

import plora_kernels as pk
from fed import interruption
from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.errors import FedError, machine_faults
from fed.files import make_folder, naming, replacing
from fed.locks import held
from fed.models.reference import name_of
from fed.models.shared_model import SharedModel, adapted, delta_beyond_rank
from fed.simulation import checkpoint, finished
from fed.simulation.client_store import client_store
from fed.simulation.evaluation import WorkProgress
from fed.simulation.finished import ADAPTER, BASE_DELTA
from fed.simulation.inputs import input_digests
from fed.simulation.rounds import Executor, Federation
from fed.simulation.rows import RowFile
from fed.simulation.run_directory import BASE
from fed.simulation.similarity import FOLDER as SIMILARITY
from fed.simulation.similarity import save_similarity, similarity_files
from fed.types import Row, ServerState

# Files that were being written when a process was killed, by this package and by safetensors.
_UNFINISHED = re.compile(
    r"(config\.toml|rounds\.jsonl|base_delta\.safetensors|(finished|centralised)\.json|round-\d+\.npz|report\.html"
    r"|(report|similarity)\.png)\.tmp|\.tmp[A-Za-z0-9]{6}"
)


def simulate(
    config: RunConfig,
    data: FederatedData,
    model: nn.Module,
    head_names: Sequence[str],
    directory: Path,
    on_round: Callable[[Row], object] | None = None,
    on_event: Callable[[str], object] | None = None,
    *,
    resume: bool = False,
    on_ready: Callable[[RunConfig], object] | None = None,
    on_progress: WorkProgress | None = None,
    executor: Executor | None = None,
) -> list[Row]:
    """Run `config.rounds` federated rounds and return their rows (`fed.types.Row`); row 0 is the unadapted model.

    Each row is appended to `directory/rounds.jsonl` at the end of its round and then passed to `on_round`. `on_event`
    receives messages, for example one for each client whose update cannot be used; `on_progress` is called while
    answers are generated.

    At the end the adapter, and the head if it was trained, is saved to `directory/adapter` in PEFT's format. A method
    that folds into the base, or holds more than R modules in a matrix, also leaves
    `directory/base_delta.safetensors`: for each parameter name the fp32 tensor to add to the base's weight before the
    adapter is applied. `directory/similarity` holds the cosines between modules in the first and the last round. After
    all of it `directory/finished.json` is written (`fed.simulation.finished`): without it the result is not complete.

    Nothing is written before the first row is ready. `on_ready` is called then, with the configuration as it is run;
    it may put `directory` in its place, which is otherwise made. Results of an earlier run in it are removed. The model
    is restored before this function returns.

    What clients keep between rounds is stored in `directory/checkpoint/clients` (`fed.simulation.client_store`). After
    every `config.checkpoint_every`-th round and the last, a checkpoint is written to `directory/checkpoint`. With
    `resume` the run continues from the last one that is whole; configuration, data and base model must be the same,
    but `rounds` may be larger. Rows of rounds after the checkpoint are dropped and those rounds are played again, so
    that all files equal those of an uninterrupted run except for times and peak memory. The returned rows are those of
    the whole run; `on_round` receives only the new ones.

    With an `executor` the clients train elsewhere, on other machines for example.

    Ctrl-C takes effect between two steps of a client. The directory is held against other processes meanwhile.

    Raises FedError with `resume` if there is no checkpoint to go on from, or it was made with another configuration or
    other inputs, if another process works in the directory, and if the machine refuses memory or room on its disk.
    """
    tell, lasting = on_event or _discard, config.checkpoint_every > 0
    inputs = input_digests(data, model)
    with interruption.deferred(), machine_faults(), ExitStack() as stack:
        if directory.is_dir():
            stack.enter_context(held(directory))
        shared = stack.enter_context(adapted(config, model, head_names))
        store = stack.enter_context(client_store(directory / checkpoint.FOLDER, shared.device, lasting))
        federation = Federation(
            config, data.to(shared.device), shared, tell, store, None, on_progress, executor, inputs
        )
        state = federation.beginning()
        rows: list[Row] = []
        file: RowFile | None = None
        if resume:
            standing = checkpoint.load(directory, config, state, store, inputs, tell)
            state, rows, size = standing.state, standing.rows, standing.clients_per_pass
            _check_ends_with_answers(directory, config, rows)
            federation = replace(federation, clients_per_pass=size)
            _sweep(directory)
            file = stack.enter_context(closing(RowFile(directory, standing.lines)))
        elif config.execution == "cohort" and executor is None:
            size = federation.measure_cohort_size(state)
        if config.execution == "cohort" and executor is None and not config.clients_per_pass:
            # What was measured is a setting from here on, with which another machine makes the same files.
            config = config.model_copy(update={"clients_per_pass": size})
        for played in federation.play(state, begun=resume):
            state, number = played.state, played.state.server.round
            if file is None:
                _make_ready(directory, config, on_ready, stack)
                file = stack.enter_context(closing(RowFile(directory)))
            if config.measure.similarity and number in (1, config.rounds) and played.updates:
                save_similarity(directory, number, played.updates, shared.rank)
            rows.append(played.row)
            file.append(played.row)
            if checkpoint.is_due(config, number):
                checkpoint.save(directory, config, state, store, file.seal, inputs)
            if on_round is not None:
                on_round(played.row)
            interruption.check()
        assert file is not None  # because a run has row 0
        _save_result(directory, config, shared, state.server)
        finished.mark(directory, config, state.server.round, file.seal, inputs)
    return rows


def save_base_delta(directory: Path, server: ServerState, rank: int) -> None:
    """Write the part of the server's ΔW that `rank` modules in each matrix do not hold, by parameter name.

    The saved adapter belongs on a base of `weight + delta`, computed in fp32 and rounded once to the weight's dtype.
    If there is no such part, no file is written and an old one is removed.
    """
    path = directory / BASE_DELTA
    total = delta_beyond_rank(server, rank)
    if not total:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        save_file({f"{matrix}.weight": delta.cpu().contiguous() for matrix, delta in total.items()}, temporary)


def _make_ready(
    directory: Path, config: RunConfig, on_ready: Callable[[RunConfig], object] | None, stack: ExitStack
) -> None:
    """Put the run's directory in its place, hold it, and remove what an earlier run left in it."""
    if on_ready is not None:
        on_ready(config)
    make_folder(directory)
    stack.enter_context(held(directory))
    finished.unmark(directory)
    checkpoint.clear(directory)
    for path in similarity_files(directory):
        path.unlink()


def _check_ends_with_answers(directory: Path, config: RunConfig, rows: Sequence[Row]) -> None:
    """Raise FedError if the last round was played already, but as one before it, without the answers of a last one."""
    last = rows[-1]
    if config.measure.generate == "last" and last["round"] == config.rounds and last["accuracy"] is None:
        raise FedError(
            f"rounds is {config.rounds}, and {str(directory)!r} has played that round without generating answers, as "
            "measure.generate = 'last' says of rounds before the last; more rounds would be right"
        )


def _save_result(directory: Path, config: RunConfig, shared: SharedModel, server: ServerState) -> None:
    """Save what the run ends with; the mark of an earlier end is removed first, for the files change one by one."""
    finished.unmark(directory)
    for path in set(similarity_files(directory)) - set(similarity_files(directory, config.rounds)):
        path.unlink()  # of a run that is over more rounds now
    save_base_delta(directory, server, config.adapter.rank)
    with naming(directory / ADAPTER):
        pk.save_peft(shared.handle, directory / ADAPTER, base_model_name_or_path=name_of(directory / BASE, config))


def _sweep(directory: Path) -> None:
    """Remove the temporary files and folders that a run leaves whose process was killed."""
    for folder in (directory, directory / SIMILARITY):
        for path in folder.iterdir() if folder.is_dir() else ():
            if _UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink()
    for path in (directory / ADAPTER).glob(".adapter-*"):
        shutil.rmtree(path)


def _discard(event: str) -> None:
    pass
