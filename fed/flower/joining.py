"""How machines join a run: what they are told, and which of those that answer may take part."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from flwr.app import RecordDict

from fed.files import make_folder
from fed.flower.protocol import versions, why_other_version
from fed.flower.records import FACTS, arrays_of, facts_record
from fed.sealed import read_sealed, write_sealed
from fed.simulation.rounds import Federation
from fed.simulation.run_directory import BASE

STATE = "flower.json"  # in a run's directory: the key by which machines know the run again
_MOST_ROWS = 2**40


def key_of(directory: Path) -> str:
    """Return the key by which machines know a run again; it is made once."""
    path = directory / STATE
    if not path.is_file():
        make_folder(directory)
        write_sealed(path, {"run": secrets.token_hex(16)})
    return str(read_sealed(path)["run"])


def invitation(federation: Federation, key: str, directory: Path) -> RecordDict:
    """Return what a machine needs to join: the settings, the digests of all inputs, and the saved base."""
    settings = federation.config.model_dump(exclude_none=True, mode="json")
    facts = {
        "run": key,
        "versions": versions(),
        "settings": tomli_w.dumps(settings),
        "inputs": dict(federation.inputs),
    }
    base = {
        path.name: torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())
        for path in sorted((directory / BASE).iterdir())
    }
    return RecordDict({FACTS: facts_record(facts), "base": arrays_of(base)})


def why_not(facts: Mapping[str, Any], federation: Federation, key: str) -> str | None:
    """Return in words why a machine that said `facts` of itself cannot take part, or None.

    In a deployment `facts["client"]` says which client it is: its id, its rank and its number of rows.
    """
    if why := why_other_version(versions(), facts.get("versions")):
        return why
    if "refused" in facts:
        return str(facts["refused"])
    if facts.get("run") != key:
        return "it has joined another run"
    if federation.config.engine.mode == "simulation":
        return None
    client, most = facts.get("client"), federation.config.adapter.rank
    numbers: list[Any] = [client.get(name) for name in ("id", "rank", "rows")] if isinstance(client, dict) else []
    if len(numbers) != 3 or any(type(number) is not int for number in numbers):
        return "it does not say which client it is"
    number, rank, rows = map(int, numbers)
    if not (0 <= number < federation.config.clients.count and 1 <= rank <= most and 1 <= rows < _MOST_ROWS):
        return f"it says that it is client {number} of rank {rank} with {rows} rows, which cannot be"
    if federation.method.equal_ranks and rank != most:
        return f"its rank is {rank}; {federation.method.title} needs every rank to be adapter.rank ({most})"
    return None
