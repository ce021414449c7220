"""A whole federated run: play its rounds and write its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

import plora_kernels as pk
from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.files import replacing, write_atomically
from fed.models.shared_model import adapted, delta_beyond_rank
from fed.simulation import checkpoint
from fed.simulation.client_store import client_store
from fed.simulation.rounds import Federation
from fed.simulation.run_directory import ADAPTER, BASE, ROUNDS, parse_row
from fed.simulation.similarity import save_similarity
from fed.types import Row, ServerState

BASE_DELTA = "base_delta.safetensors"


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
) -> list[Row]:
    """Run `config.rounds` federated rounds and return their rows (`fed.types.Row`); row 0 is the unadapted model.

    Each row is appended to `directory/rounds.jsonl` at the end of its round and then passed to `on_round`. `on_event`
    receives messages, for example one for each client whose update cannot be used.

    At the end the adapter, and the head if it was trained, is saved to `directory/adapter` in PEFT's format. A method
    that folds into the base, or holds more than R modules in a matrix, also leaves
    `directory/base_delta.safetensors`: for each parameter name the fp32 tensor to add to the base's weight before the
    adapter is applied. `directory/similarity` holds the cosines between modules in the first and the last round.

    The directory is created only after the adapter has been put into the model, so a model that does not fit leaves
    none. The model is restored before this function returns.

    What clients keep between rounds is stored in `directory/checkpoint/clients` (`fed.simulation.client_store`). After
    every `config.checkpoint_every`-th round and the last, a checkpoint is written to `directory/checkpoint`. With
    `resume` the run continues from it; configuration, data and base model must be the same, but `rounds` may be larger.
    Rows of rounds after the checkpoint are dropped and those rounds are played again, so that all files equal those of
    an uninterrupted run except for times and peak memory. The returned rows are those of the whole run; `on_round`
    receives only the new ones.

    Raises FedError with `resume` if there is no checkpoint, or it was made with another configuration.
    """
    lasting = config.checkpoint_every > 0
    with (
        adapted(config, model, head_names) as shared,
        client_store(directory / checkpoint.FOLDER, shared.device, lasting) as store,
    ):
        federation = Federation(config, data.to(shared.device), shared, on_event or _discard, store)
        state = federation.beginning()
        rows: list[Row] = []
        if resume:
            state = checkpoint.load(directory, config, state, store)
            # A checkpoint of round 0 keeps no row, because `Federation.play` then yields row 0 again.
            rows = _kept_rows(directory / ROUNDS, state.server.round or -1)
            measured = next((row["clients_per_pass"] for row in reversed(rows) if row.get("clients_per_pass")), None)
            federation = replace(federation, clients_per_pass=measured)
        else:
            store.clear()
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ROUNDS).open("a" if resume else "w", encoding="utf-8") as file:
            for played in federation.play(state):
                state, number = played.state, played.state.server.round
                if config.measure.similarity and number in (1, config.rounds) and played.updates:
                    save_similarity(directory, number, played.updates, shared.rank)
                rows.append(played.row)
                file.write(json.dumps(played.row, allow_nan=False) + "\n")
                file.flush()
                if checkpoint.is_due(config, number):
                    checkpoint.save(directory, config, state, store)
                if on_round is not None:
                    on_round(played.row)
        pk.save_peft(shared.handle, directory / ADAPTER, base_model_name_or_path=str(directory / BASE))
        save_base_delta(directory, state.server, config.adapter.rank)
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


def _kept_rows(path: Path, last: int) -> list[Row]:
    """Return the rows up to round `last` and remove all later lines from the file, incomplete ones included."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    kept = lines[: last + 1]
    rows = [parse_row(line) for line in kept]  # before anything is removed: a damaged row leaves the file as it is
    write_atomically(path, "".join(f"{line}\n" for line in kept))
    return rows


def _discard(event: str) -> None:
    pass
