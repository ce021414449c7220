"""What a run needs to go on after it was stopped: the server, its clients' memories, and where it stood.

`checkpoint/round-N/` holds `state.safetensors`, every tensor by a slash-joined name, and `state.json`. A round's folder
is complete under its name or not there: it is written under another and renamed, and older ones go after that.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fed.errors import FedError
from fed.federation import Standing
from fed.types import Client, Factors, ServerState

if TYPE_CHECKING:
    from fed.config import RunConfig

FOLDER, TENSORS, FACTS = "checkpoint", "state.safetensors", "state.json"
# Settings a run may be continued with other values of.
_FREE = ("rounds", "threads", "checkpoint_every", "device", "tracker")


def is_due(config: RunConfig, number: int) -> bool:
    """Say whether a checkpoint is saved after round `number`."""
    every = config.checkpoint_every
    return every > 0 and (number % every == 0 or number == config.rounds)


def last_round(directory: Path) -> int | None:
    """Return the round of a run's checkpoint, None where there is none."""
    found = [_number(path) for path in (directory / FOLDER).glob("round-*") if _number(path) is not None]
    return max((number for number in found if number is not None), default=None)


def save(directory: Path, config: RunConfig, standing: Standing) -> None:
    """Write the checkpoint of the round the run stands at, then remove older ones."""
    from safetensors.torch import save_file

    folder, number = directory / FOLDER, standing.server.round
    target, temporary = folder / f"round-{number}", folder / f"round-{number}.tmp"
    for path in (temporary, target):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in _tensors(standing).items()}
    save_file(tensors, temporary / TENSORS)
    server = standing.server
    facts = {
        "round": number,
        "fold_bytes": server.fold_bytes,
        "last_rounds": [client.last_round for client in standing.clients],
        "settings": _settings(config),
    }
    (temporary / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    temporary.rename(target)
    for path in folder.glob("round-*"):
        if path != target:
            shutil.rmtree(path)


def load(directory: Path, config: RunConfig, beginning: Standing) -> Standing:
    """Return where a run stood at its checkpoint; `beginning` is where it stood before its first round.

    Raises FedError where there is no checkpoint, it cannot be read, or it was made with other settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    number = last_round(directory)
    if number is None:
        raise FedError(f"{str(directory)!r} holds no checkpoint to go on from; start the run anew")
    folder = directory / FOLDER / f"round-{number}"
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise FedError(f"the checkpoint {str(folder)!r} cannot be read: {error}") from None
    _check_settings(facts["settings"], _settings(config), folder)
    return _standing(beginning, facts, tensors)


def _number(path: Path) -> int | None:
    match = re.fullmatch(r"round-(\d+)", path.name)
    return int(match[1]) if match else None


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return every setting a continued run must share, by dotted name, as JSON holds it."""
    flat: dict[str, Any] = {}

    def walk(table: Any, prefix: str) -> None:
        for name, value in vars(table).items():
            if hasattr(value, "__dict__"):
                walk(value, f"{prefix}{name}.")
            elif prefix + name not in _FREE:
                flat[prefix + name] = value

    walk(config, "")
    settings: dict[str, Any] = json.loads(json.dumps(flat))
    return settings


def _check_settings(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for name in sorted({*saved, *now}):
        if saved.get(name) != now.get(name):
            raise FedError(
                f"the checkpoint {str(folder)!r} was made with {name} = {saved.get(name)!r}, and the run has "
                f"{now.get(name)!r}; a run goes on with the settings it began with"
            )


def _tensors(standing: Standing) -> dict[str, Tensor]:
    """Return every tensor of a standing by name: `adapter/A/MATRIX`, `clients/3/memory/NAME`, …"""
    server = standing.server
    named: dict[str, Tensor] = {}
    named |= _factors("adapter", server.adapter.factors)
    for group in ("head", "base_delta", "visits", "moments"):
        named |= {f"{group}/{name}": value for name, value in getattr(server, group).items()}
    for client in (client for client in standing.clients if client.last_round):
        for group in ("memory", "head"):
            for name, value in getattr(client, group).items():
                named[f"clients/{client.id}/{group}/{name}"] = value
    for number, factors in standing.ends.items():
        named |= _factors(f"ends/{number}", factors)
    return named


def _factors(prefix: str, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {
        f"{prefix}/{side}/{matrix}": factor
        for matrix, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }


def _standing(beginning: Standing, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Standing:
    """Put a standing together again, tensors of the model on its device and counts on the CPU."""
    first = beginning.server
    device = next(iter(first.adapter.factors.values()))[0].device
    matrices = list(first.adapter.factors)

    def group(prefix: str, place: torch.device = device) -> dict[str, Tensor]:
        names = (name for name in tensors if name.startswith(f"{prefix}/"))
        return {name.removeprefix(f"{prefix}/"): tensors[name].to(place) for name in names}

    def factors(prefix: str) -> dict[str, Factors]:
        down, up = group(f"{prefix}/A"), group(f"{prefix}/B")
        return {matrix: (down[matrix], up[matrix]) for matrix in matrices}

    server: ServerState = replace(
        first,
        adapter=replace(first.adapter, factors=factors("adapter")),
        head={name: group("head")[name] for name in first.head},
        round=int(facts["round"]),
        base_delta=group("base_delta"),
        fold_bytes=tuple(facts["fold_bytes"]),
        visits=group("visits", torch.device("cpu")),
        moments=group("moments"),
    )
    clients: list[Client] = [
        replace(
            client,
            memory=group(f"clients/{client.id}/memory"),
            head=group(f"clients/{client.id}/head"),
            last_round=int(seen),
        )
        if seen
        else client
        for client, seen in zip(beginning.clients, facts["last_rounds"], strict=True)
    ]
    seen_before = sorted({int(name.split("/")[1]) for name in tensors if name.startswith("ends/")})
    return Standing(server, tuple(clients), {number: factors(f"ends/{number}") for number in seen_before})
