"""Checkpoints, from which an interrupted run continues: the server's state and references to its clients' files.

`checkpoint/round-N/` holds `state.safetensors`, the server's tensors by slash-joined names, and `state.json`, which
refers to the files in `checkpoint/clients` (`fed.simulation.client_store`). A client's file is written once, in the
round that the client took part in, not again with every checkpoint. `state.json` holds digests of all these files, of
the rows up to round N, of the run's inputs, and of itself.

Everything that a checkpoint refers to is flushed to the disk before its folder, written under a temporary name, is
renamed. The last two checkpoints are kept: if a file of the last one is damaged, the run goes on from the one before.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fed.config import RunConfig, flat, renamed
from fed.errors import FedError
from fed.files import digest_of, replacing, sync
from fed.sealed import read_sealed, write_sealed
from fed.simulation.client_store import ClientFile, ClientStore, flat_factors, group, group_factors, require_real
from fed.simulation.inputs import check_same
from fed.simulation.rows import RowSeal, first_lines, parse_rows, sealed_lines
from fed.simulation.settings import changed_setting, fixed_settings
from fed.simulation.similarity import similarity_files
from fed.types import Client, Row, RunState, Sent, ServerState

FOLDER, TENSORS, FACTS = "checkpoint", "state.safetensors", "state.json"
_OWN = re.compile(r"round-(\d+)(\.tmp)?")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, SafetensorError)


@dataclass(frozen=True)
class Standing:
    """Where a run stands at a checkpoint: its state, and its rows so far with the lines that hold them.

    `clients_per_pass` is the size of cohorts, None if it has not been measured.
    """

    state: RunState
    rows: list[Row]
    lines: bytes
    clients_per_pass: int | None


@dataclass(frozen=True)
class _Saved:
    """What a whole checkpoint holds: its facts and tensors, the clients' files it refers to, and the run's rows."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    entries: Mapping[int, ClientFile]
    rows: list[Row]
    lines: bytes


def is_due(config: RunConfig, number: int) -> bool:
    """Return whether a checkpoint is saved after round `number`."""
    every = config.checkpoint_every
    return every > 0 and (number % every == 0 or number == config.rounds)


def last_round(directory: Path) -> int | None:
    """Return the round of a run's last checkpoint, or None if there is none."""
    return max(_rounds(directory), default=None)


def save(
    directory: Path, config: RunConfig, state: RunState, store: ClientStore, rows: RowSeal, inputs: Mapping[str, str]
) -> None:
    """Write a checkpoint of the run's current round, and delete all others but the one before it.

    `rows` is the seal of the rows up to this round, which must be on the disk; `inputs` are the digests of the inputs.
    """
    folder, number = directory / FOLDER, state.server.round
    require_real([folder])
    target, temporary = folder / f"round-{number}", folder / f"round-{number}.tmp"
    for path in (target, temporary):
        if path.exists():
            shutil.rmtree(path)
    temporary.mkdir(parents=True)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in _tensors(state.server).items()}
    with replacing(temporary / TENSORS) as unnamed:
        save_file(tensors, unnamed)
    facts = {
        "round": number,
        # Of a method that folds nothing they are a 0 for each round, which need no text.
        "fold_bytes": state.server.fold_bytes if any(state.server.fold_bytes) else (),
        "idle_rounds": state.server.idle_rounds,
        "sent": dict(sorted(state.sent.items())),
        "last_rounds": [client.last_round for client in state.clients],
        "kept_rounds": {c.id: c.kept_round for c in state.clients if c.kept_round != c.last_round},
        "kept": {client: entry._asdict() for client, entry in sorted(store.entries.items())},
        "settings": fixed_settings(config),
        "rows": rows,
        "inputs": dict(inputs),
        "tensors": digest_of(temporary / TENSORS),
        "similarity": {path.name: digest_of(path) for path in similarity_files(directory, config.rounds)},
    }
    write_sealed(temporary / FACTS, facts)
    store.sync()
    temporary.rename(target)
    sync([folder, directory])
    _remove_all_but(folder, {number, *sorted(other for other in _rounds(directory) if other < number)[-1:]})
    store.checkpointed()


def load(
    directory: Path,
    config: RunConfig,
    beginning: RunState,
    store: ClientStore,
    inputs: Mapping[str, str],
    on_event: Callable[[str], object],
) -> Standing:
    """Return where a run stands at its last checkpoint; `beginning` is its state before the first round.

    If a file of that checkpoint is damaged, the one before it is taken, and `on_event` told so. The store takes over
    the clients' files that are still referred to, and deletes all others. Raises FedError, with nothing changed, if
    there is no checkpoint, none is whole, or it was made with other settings or inputs, or after more rounds.
    """
    found, fault = _last_whole(directory, store)
    _check_goes_on(directory, config, found.facts, inputs)
    _check_fits(directory, beginning, found)
    number = int(found.facts["round"])
    if fault is not None:
        on_event(f"{fault}; the run goes on from the checkpoint of round {number}")
    _check_similarity(directory, found.facts, on_event)
    kept = {**_entries_before(directory, number), number: found.entries}
    _remove_all_but(directory / FOLDER, kept)
    store.adopt(kept.values())
    size = found.facts["settings"].get("clients_per_pass") or _measured_size(found.rows)
    return Standing(_state(beginning, found, store), found.rows, found.lines, size)


def clear(directory: Path) -> None:
    """Delete a run's checkpoints and what its clients keep, and then the folders of both if they are empty."""
    require_real([directory / FOLDER])
    _remove_all_but(directory / FOLDER, ())
    ClientStore(directory / FOLDER, torch.device("cpu")).clear()


def row_seals(directory: Path) -> list[RowSeal]:
    """Return the seals of the rows that a run's checkpoints hold, without those of damaged ones."""
    return [RowSeal(*facts["rows"]) for facts in _readable(directory) if "rows" in facts]


def saved_inputs(directory: Path) -> dict[str, str]:
    """Return the digests of the inputs of a run that is in the last checkpoint, or nothing if there is none."""
    return next((dict(facts["inputs"]) for facts in _readable(directory) if "inputs" in facts), {})


def saved_settings(directory: Path) -> dict[str, Any]:
    """Return the settings of a run that are in the last checkpoint, or nothing if there is none."""
    return next((dict(flat(renamed(facts["settings"]))) for facts in _readable(directory)), {})


def _readable(directory: Path) -> list[dict[str, Any]]:
    """Return what the checkpoints of a run hold, the last one first, without damaged ones."""
    found = []
    for number in sorted(_rounds(directory), reverse=True):
        with suppress(FedError):
            found.append(read_sealed(directory / FOLDER / _name(number) / FACTS, plain=True))
    return found


def _measured_size(rows: Sequence[Row]) -> int | None:
    """Return the size of cohorts that a run measured, by its rows: earlier versions did not save it otherwise."""
    return next((row["clients_per_pass"] for row in reversed(rows) if row.get("clients_per_pass")), None)


def _name(number: int) -> str:
    return f"round-{number}"


def _rounds(directory: Path) -> list[int]:
    """Return the rounds of a run's checkpoints."""
    names = (_OWN.fullmatch(path.name) for path in (directory / FOLDER).glob("round-*"))
    return [int(name[1]) for name in names if name and not name[2]]


def _remove_all_but(folder: Path, rounds: Collection[int]) -> None:
    """Delete the checkpoints of other rounds, and incomplete ones of interrupted writes."""
    kept = {_name(number) for number in rounds}
    others = [path for path in folder.glob("round-*") if _OWN.fullmatch(path.name) and path.name not in kept]
    require_real(others)
    for path in others:
        shutil.rmtree(path)


def _last_whole(directory: Path, store: ClientStore) -> tuple[_Saved, str | None]:
    """Return the last checkpoint of which nothing is damaged, and what is damaged of the last of all, if anything is.

    Raises FedError if there is none.
    """
    numbers = sorted(_rounds(directory), reverse=True)
    faults: list[str] = []
    require_real([directory / FOLDER, *(directory / FOLDER / _name(number) for number in numbers)])
    for number in numbers:
        try:
            return _whole(directory, number, store), faults[0] if faults else None
        except FedError as error:
            faults.append(str(error))
    if not faults:
        raise FedError(f"{str(directory)!r} holds no checkpoint to go on from; start the run anew")
    raise FedError(f"{faults[0]}; no checkpoint is whole: put back that file, or start the run anew")


def _whole(directory: Path, number: int, store: ClientStore) -> _Saved:
    """Read a checkpoint and the rows up to it; raise FedError if any part of it is damaged or missing."""
    folder = directory / FOLDER / _name(number)
    facts = read_sealed(folder / FACTS, plain=True)
    try:
        if facts["round"] != number:
            raise FedError(f"{str(folder)!r} is damaged: it is the checkpoint of round {facts['round']}")
        if facts.get("tensors", known := digest_of(folder / TENSORS)) != known:
            raise FedError(f"{str(folder / TENSORS)!r} is damaged: it does not fit its digest")
        tensors, entries = load_file(folder / TENSORS), _entries(facts)
        if "rows" in facts:
            lines = sealed_lines(directory, RowSeal(*facts["rows"]))
        else:  # of an earlier version
            lines = first_lines(directory, number + 1)
    except FedError:
        raise
    except OSError as error:
        raise FedError(f"the checkpoint {str(folder)!r} cannot be read: {error.strerror}") from None
    except _MALFORMED as error:
        raise FedError(f"the checkpoint {str(folder)!r} cannot be read: {error}") from None
    rows = parse_rows(directory, lines)
    if len(rows) != number + 1:
        raise FedError(f"{str(folder)!r} is damaged: it goes with {len(rows)} rows")
    store.check(number, entries)
    return _Saved(facts, tensors, entries, rows, lines)


def _entries(facts: Mapping[str, Any]) -> dict[int, ClientFile]:
    """Return the clients' files that a checkpoint refers to; earlier versions wrote a list for each."""
    found = {}
    for client, entry in facts["kept"].items():
        if isinstance(entry, list):
            entry = {"round": entry[0], "fields": entry[1:], "digest": ""}
        found[int(client)] = ClientFile(int(entry["round"]), tuple(entry["fields"]), str(entry["digest"]))
    return found


def _entries_before(directory: Path, number: int) -> dict[int, dict[int, ClientFile]]:
    """Return the clients' files of the checkpoint before round `number`, by its round; nothing if it is damaged."""
    before = max((other for other in _rounds(directory) if other < number), default=None)
    if before is None:
        return {}
    try:
        return {before: _entries(read_sealed(directory / FOLDER / _name(before) / FACTS, plain=True))}
    except (FedError, *_MALFORMED):
        return {}


def _check_goes_on(directory: Path, config: RunConfig, facts: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Raise FedError if a run with this configuration and these inputs cannot go on from a checkpoint."""
    settings = dict(flat(renamed(facts["settings"])))
    if (changed := changed_setting(settings, fixed_settings(config))) is not None:
        raise FedError(f"{str(directory)!r} was made with {changed}; a run goes on with the settings it began with")
    if facts["round"] > config.rounds:
        raise FedError(
            f"rounds is {config.rounds}, and {str(directory)!r} has played {facts['round']}; it should be at least that"
        )
    check_same(facts.get("inputs", {}), inputs, f"the run in {str(directory)!r}")


def _check_similarity(directory: Path, facts: Mapping[str, Any], on_event: Callable[[str], object]) -> None:
    """Delete maps of similarity that are damaged, and say so: they are pictures alone, and the run can go on."""
    there = {path.name: path for path in similarity_files(directory)}
    for name, known in facts.get("similarity", {}).items():
        if name not in there:
            on_event(f"{name}, the similarity of modules after a round, is missing and stays so")
        elif digest_of(there[name]) != known:
            there[name].unlink()
            on_event(f"{str(there[name])!r} was damaged and is left out")


def _check_fits(directory: Path, beginning: RunState, found: _Saved) -> None:
    """Raise FedError unless a checkpoint's tensors have the names, shapes and types of this run's."""
    first, misfit = beginning.server, f"{str(directory)!r} holds the checkpoint of another run"
    tensors: Mapping[str, Tensor] = found.tensors
    modules: dict[str, int] = {}
    for matrix, pair in first.adapter.factors.items():
        for side, own in zip("AB", pair, strict=True):
            value = tensors.get(f"adapter/{side}/{matrix}")
            if value is None or value.dim() != 2 or value.dtype != own.dtype:
                raise FedError(f"{misfit}: it has no {side} of {matrix} in {own.dtype}")
            count, width = value.shape if side == "A" else value.shape[::-1]
            if width != own.shape[1 if side == "A" else 0] or modules.setdefault(matrix, count) != count:
                raise FedError(f"{misfit}: its {side} of {matrix} is {tuple(value.shape)}")
    expected = {f"head/{name}": value for name, value in first.head.items()}
    for name in {*expected, *(name for name in tensors if name.startswith("head/"))}:
        saved, wanted = tensors.get(name), expected.get(name)
        if saved is None or wanted is None or saved.shape != wanted.shape or saved.dtype != wanted.dtype:
            raise FedError(f"{misfit}: {name} is not as in this run")
    if len(found.facts["last_rounds"]) != len(beginning.clients):
        raise FedError(f"{misfit}: it has {len(found.facts['last_rounds'])} clients, not {len(beginning.clients)}")


def _tensors(server: ServerState) -> dict[str, Tensor]:
    """Return every tensor of the server by name: `adapter/A/MATRIX`, `head/NAME`, …"""
    named = flat_factors("adapter", server.adapter.factors)
    for field in ("head", "base_delta", "visits", "moments"):
        named |= {f"{field}/{name}": value for name, value in getattr(server, field).items()}
    return named


def _state(beginning: RunState, found: _Saved, store: ClientStore) -> RunState:
    """Rebuild the state of a run, with `visits` on the CPU and all other tensors on the model's device."""
    first, facts = beginning.server, found.facts
    device = next(iter(first.adapter.factors.values()))[0].device
    placed = {name: value if name.startswith("visits/") else value.to(device) for name, value in found.tensors.items()}
    factors, head = group_factors(placed, "adapter"), group(placed, "head")
    server: ServerState = replace(
        first,
        adapter=replace(first.adapter, factors={matrix: factors[matrix] for matrix in first.adapter.factors}),
        head={name: head[name] for name in first.head},
        round=int(facts["round"]),
        base_delta=group(placed, "base_delta"),
        fold_bytes=tuple(facts["fold_bytes"]) or (0,) * int(facts["round"]),
        idle_rounds=int(facts.get("idle_rounds", 0)),
        visits=group(placed, "visits"),
        moments=group(placed, "moments"),
    )
    clients: list[Client] = []
    kept_rounds = facts.get("kept_rounds", {})  # where they are not the last rounds; an earlier version had none
    for client, seen in zip(beginning.clients, facts["last_rounds"], strict=True):
        if client.id in store.entries:
            kept = store.stored(client.id)
            client = replace(client, memory=kept.memory, head=kept.head)
        number = int(kept_rounds.get(str(client.id), seen))
        clients.append(replace(client, last_round=int(seen), kept_round=number))
    ends = {client: store.stored(client).ends for client, entry in store.entries.items() if "ends" in entry.fields}
    sent = {int(client): tuple(Sent(*one) for one in known) for client, known in facts.get("sent", {}).items()}
    return RunState(server, tuple(clients), ends, sent)
