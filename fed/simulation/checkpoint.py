"""Checkpoints, from which an interrupted run continues: the server's state and references to its clients' files.

`checkpoint/round-N/` holds `state.safetensors`, the server's tensors by slash-joined names, and `state.json`, which
refers to the files in `checkpoint/clients` (`fed.simulation.client_store`). A client's file is written once, in the
round that the client took part in, not again with every checkpoint. The folder of a checkpoint is written under a
temporary name and renamed, so a folder `round-N` is always complete. After that older checkpoints are deleted, and then
the clients' files that the new one does not refer to.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fed.config import RunConfig, flat, located, renamed, same_setting
from fed.errors import FedError
from fed.simulation.client_store import ClientFile, ClientStore, flat_factors, group, group_factors
from fed.types import Client, RunState, ServerState

FOLDER, TENSORS, FACTS = "checkpoint", "state.safetensors", "state.json"
# Settings that may change when a run is resumed.
_FREE = ("rounds", "threads", "checkpoint_every", "device", "tracker")


def is_due(config: RunConfig, number: int) -> bool:
    """Return whether a checkpoint is saved after round `number`."""
    every = config.checkpoint_every
    return every > 0 and (number % every == 0 or number == config.rounds)


def last_round(directory: Path) -> int | None:
    """Return the round of a run's last checkpoint, or None if there is none."""
    names = (re.fullmatch(r"round-(\d+)", path.name) for path in (directory / FOLDER).glob("round-*"))
    return max((int(name[1]) for name in names if name), default=None)


def save(directory: Path, config: RunConfig, state: RunState, store: ClientStore) -> None:
    """Write a checkpoint of the run's current round, then delete the others."""
    folder, number = directory / FOLDER, state.server.round
    target, temporary = folder / f"round-{number}", folder / f"round-{number}.tmp"
    for path in (temporary, target):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in _tensors(state.server).items()}
    save_file(tensors, temporary / TENSORS)
    facts = {
        "round": number,
        "fold_bytes": state.server.fold_bytes,
        "last_rounds": [client.last_round for client in state.clients],
        "kept": {client: (entry.round, *entry.fields) for client, entry in sorted(store.entries.items())},
        "settings": _settings(config),
    }
    (temporary / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    temporary.rename(target)
    _remove_others(target)
    store.checkpointed(number)


def load(directory: Path, config: RunConfig, beginning: RunState, store: ClientStore) -> RunState:
    """Return the state of a run at its last checkpoint; `beginning` is its state before the first round.

    The store takes over the clients' files that the checkpoint refers to, and deletes all others. Raises FedError if
    there is no checkpoint, it cannot be read, a client's file is missing, or it was made with other settings.
    """
    number = last_round(directory)
    if number is None:
        raise FedError(f"{str(directory)!r} holds no checkpoint to go on from; start the run anew")
    folder = directory / FOLDER / f"round-{number}"
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise FedError(f"the checkpoint {str(folder)!r} cannot be read: {error}") from None
    _check_settings(dict(flat(renamed(facts["settings"]))), _settings(config), folder)
    entries = {int(client): ClientFile(entry[0], tuple(entry[1:])) for client, entry in facts["kept"].items()}
    store.adopt(number, entries)
    _remove_others(folder)
    return _standing(beginning, facts, tensors, store)


def _remove_others(folder: Path) -> None:
    """Delete all other checkpoints in the folder's parent, including incomplete ones of interrupted writes."""
    for path in folder.parent.glob("round-*"):
        if path != folder:
            shutil.rmtree(path)


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return every setting that must not change when a run is resumed, by dotted name, as JSON values."""
    return {key: value for key, value in flat(located(config.model_dump(mode="json"))) if key not in _FREE}


def _check_settings(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for name in sorted({*saved, *now}):
        if not same_setting(name, saved.get(name), now.get(name)):
            raise FedError(
                f"the checkpoint {str(folder)!r} was made with {name} = {saved.get(name)!r}, and the run has "
                f"{now.get(name)!r}; a run goes on with the settings it began with"
            )


def _tensors(server: ServerState) -> dict[str, Tensor]:
    """Return every tensor of the server by name: `adapter/A/MATRIX`, `head/NAME`, …"""
    named = flat_factors("adapter", server.adapter.factors)
    for field in ("head", "base_delta", "visits", "moments"):
        named |= {f"{field}/{name}": value for name, value in getattr(server, field).items()}
    return named


def _standing(
    beginning: RunState, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], store: ClientStore
) -> RunState:
    """Rebuild the state of a run, with `visits` on the CPU and all other tensors on the model's device."""
    first = beginning.server
    device = next(iter(first.adapter.factors.values()))[0].device
    placed = {name: value if name.startswith("visits/") else value.to(device) for name, value in tensors.items()}
    factors, head = group_factors(placed, "adapter"), group(placed, "head")
    server: ServerState = replace(
        first,
        adapter=replace(first.adapter, factors={matrix: factors[matrix] for matrix in first.adapter.factors}),
        head={name: head[name] for name in first.head},
        round=int(facts["round"]),
        base_delta=group(placed, "base_delta"),
        fold_bytes=tuple(facts["fold_bytes"]),
        visits=group(placed, "visits"),
        moments=group(placed, "moments"),
    )
    clients: list[Client] = []
    for client, seen in zip(beginning.clients, facts["last_rounds"], strict=True):
        if client.id in store.entries:
            kept = store.stored(client.id)
            client = replace(client, memory=kept.memory, head=kept.head)
        clients.append(replace(client, last_round=int(seen)))
    ends = {client: store.stored(client).ends for client, entry in store.entries.items() if "ends" in entry.fields}
    return RunState(server, tuple(clients), ends)
