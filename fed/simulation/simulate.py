"""A whole federated run, with its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

import plora_kernels as pk
from fed.data.federated_data import FederatedData
from fed.files import replacing, write_atomically
from fed.models.shared_model import adapted, delta_beyond_rank
from fed.simulation import checkpoint
from fed.simulation.client_store import client_store
from fed.simulation.rounds import Federation
from fed.simulation.run_directory import ADAPTER, BASE, ROUNDS, parse_row
from fed.simulation.similarity import save_similarity
from fed.types import Row, ServerState

if TYPE_CHECKING:
    from fed.config import RunConfig

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
    """Run `config.rounds` federated rounds and return their rows, `fed.types.Row`: row 0 is the unadapted model.

    Every row goes to `directory/rounds.jsonl` as soon as it is known, then to `on_round`; `on_event` gets a
    line for each client left out. At the end the adapter is saved to `directory/adapter` in PEFT's format,
    with the head where it was trained; a method that folds into the base, or holds more than R modules a matrix,
    leaves `directory/base_delta.safetensors` beside it: by parameter name, what is to be added to the base's weights
    in fp32 before the adapter goes on. The directory is made only once the adapter fits the model; the model comes
    back as it was.

    What clients keep between rounds lies in `directory/checkpoint/clients` (`fed.simulation.client_store`). After every
    `config.checkpoint_every`-th round and the last, `directory/checkpoint` holds all that is needed to go on. With
    `resume` the run goes on from there, given the same configuration (more rounds are fine), data and base model: rows
    of rounds after the checkpoint are dropped and played again, and all files come out as those of a run that was never
    stopped, times and peak memory apart. The rows returned are all of the run's; `on_round` gets the new ones alone.
    Raises FedError where there is no checkpoint, or one of another configuration.

    `directory/similarity` holds the cosines between modules in the first and the last round.
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
            rows = _kept_rows(directory / ROUNDS, state.server.round or -1)  # row 0 is played anew
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
    """Write what the server's ΔW has besides `rank` modules a matrix, under the parameters' names; nothing if nothing.

    `weight + delta`, taken in fp32 and rounded once into the weight's dtype, is the base the adapter belongs to.
    """
    path = directory / BASE_DELTA
    total = delta_beyond_rank(server, rank)
    if not total:
        path.unlink(missing_ok=True)
        return
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({f"{matrix}.weight": delta.cpu().contiguous() for matrix, delta in total.items()}, temporary)


def _kept_rows(path: Path, last: int) -> list[Row]:
    """Return the rows up to round `last` and cut the file down to them; a line cut off in writing goes as well."""
    rows: list[Row] = []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for line in lines[: last + 1]:
        rows.append(parse_row(line))
    write_atomically(path, "".join(f"{line}\n" for line in lines[: last + 1]))
    return rows


def _discard(event: str) -> None:
    pass
