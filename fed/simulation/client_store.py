"""Storage on disk for what clients keep between rounds, so that memory holds at most one client's tensors at a time.

`client-I.round-N.safetensors` holds what client I kept after round N. A file is written under a temporary name, renamed
and never changed. It is deleted once its client has a newer file and the last checkpoint does not refer to it, so the
files that a checkpoint refers to exist whenever a run is interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fed.errors import FedError
from fed.files import replacing
from fed.types import Factors

FOLDER = "clients"

V = TypeVar("V")


class ClientState(NamedTuple):
    """What a client keeps after a round: its method's memory, its personal head, and the factors it ended with."""

    memory: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    ends: Mapping[str, Factors]


class ClientFile(NamedTuple):
    """A client's file: the round it was written after, and the non-empty fields of the `ClientState` in it."""

    round: int
    fields: tuple[str, ...]


class LazyMapping(Mapping[str, V]):
    """One field of a client's file as a mapping that reads the file on each access and holds no tensors itself."""

    __slots__ = ("_client", "_field", "_round", "_store")

    def __init__(self, store: ClientStore, client: int, number: int, field: str) -> None:
        self._store, self._client, self._round, self._field = store, client, number, field

    def __getitem__(self, name: str) -> V:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> Mapping[str, V]:
        fields: ClientState = self._store.read(self._client, self._round)
        found: Mapping[str, V] = getattr(fields, self._field)
        return found


class ClientStore:
    """The files of a run's clients in `directory/clients`; tensors are read onto `device`.

    The file that was read last stays in memory until another one is read.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.folder = directory / FOLDER
        self._device = device
        self.entries: dict[int, ClientFile] = {}  # each client's current file; clients that keep nothing have none
        self._checkpoint = -1  # round of the last checkpoint, which may refer to files up to that round
        self._superseded: list[Path] = []
        self._last: tuple[Path, ClientState] | None = None

    def keep(self, client: int, number: int, kept: ClientState) -> ClientState:
        """Write what a client keeps after round `number`, and return it as mappings that read the file on access.

        Raises FedError if the file cannot be written.
        """
        fields = tuple(field for field in ClientState._fields if getattr(kept, field))
        before = self.entries.pop(client, None)
        if fields:
            self._write(self._path(client, number), _flat(kept))
            self.entries[client] = ClientFile(number, fields)
        if before is not None and before.round > self._checkpoint:
            self._path(client, before.round).unlink(missing_ok=True)
        elif before is not None:
            self._superseded.append(self._path(client, before.round))
        return self.stored(client)

    def stored(self, client: int) -> ClientState:
        """Return what a client kept last as mappings that read its file on access, or empty ones if it kept nothing."""
        if client not in self.entries:
            return ClientState({}, {}, {})
        number, fields = self.entries[client]
        return ClientState(
            *(LazyMapping(self, client, number, field) if field in fields else {} for field in ClientState._fields)
        )

    def read(self, client: int, number: int) -> ClientState:
        """Return what a client kept after round `number`; raise FedError if its file is missing or damaged."""
        path = self._path(client, number)
        if self._last is None or self._last[0] != path:
            self._last = None
            try:
                tensors = load_file(path, device=str(self._device))
            except (OSError, SafetensorError) as error:
                raise FedError(
                    f"{str(path)!r}, what client {client} kept after round {number}, cannot be read: {error}; "
                    "start the run anew"
                ) from None
            self._last = path, _kept(tensors)
        return self._last[1]

    def checkpointed(self, number: int) -> None:
        """Record that a checkpoint of round `number` refers to the current files, and delete all superseded ones."""
        self._checkpoint = number
        for path in self._superseded:
            path.unlink(missing_ok=True)
        self._superseded = []

    def adopt(self, number: int, entries: Mapping[int, ClientFile]) -> None:
        """Take over the files that a checkpoint of round `number` refers to, and delete all others.

        Raises FedError if one of them is missing.
        """
        wanted = {self._path(client, entry.round).name: client for client, entry in entries.items()}
        there = {path.name for path in self.folder.glob("*")}
        if missing := sorted(wanted.keys() - there):
            raise FedError(
                f"{str(self.folder / missing[0])!r} is missing: the checkpoint of round {number} needs what client "
                f"{wanted[missing[0]]} kept; start the run anew"
            )
        for name in there - wanted.keys():
            (self.folder / name).unlink()
        self.entries, self._checkpoint = dict(entries), number

    def clear(self) -> None:
        """Delete the clients' files and their folder, and then the parent directory if it is empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _path(self, client: int, number: int) -> Path:
        return self.folder / f"client-{client}.round-{number}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
            with replacing(path) as temporary:
                save_file(own, temporary)
        except (OSError, SafetensorError) as error:
            raise FedError(f"{str(path)!r}, what a client keeps, cannot be written: {error}") from None


@contextmanager
def client_store(directory: Path, device: torch.device, lasting: bool) -> Iterator[ClientStore]:
    """Open the store of a run in `directory`; unless it is `lasting`, its files are deleted at the end."""
    store = ClientStore(directory, device)
    try:
        yield store
    finally:
        if not lasting:
            store.clear()


def flat_factors(prefix: str, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return every A and B by name: `PREFIX/A/MATRIX` and `PREFIX/B/MATRIX`."""
    return {
        f"{prefix}/{side}/{matrix}": factor
        for matrix, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `PREFIX/`, under their names without that prefix."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def group_factors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Factors]:
    """Return the factors by matrix from the tensors that `flat_factors` named: its inverse."""
    up = group(tensors, f"{prefix}/B")
    return {matrix: (A, up[matrix]) for matrix, A in group(tensors, f"{prefix}/A").items()}


def _flat(kept: ClientState) -> dict[str, Tensor]:
    named = {f"{field}/{name}": value for field in ("memory", "head") for name, value in getattr(kept, field).items()}
    return named | flat_factors("ends", kept.ends)


def _kept(tensors: Mapping[str, Any]) -> ClientState:
    return ClientState(group(tensors, "memory"), group(tensors, "head"), group_factors(tensors, "ends"))
