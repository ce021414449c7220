"""What clients keep between rounds lies on disk, a file each: memory holds one client's, however many there are.

`client-I.round-N.safetensors` is what client I kept after round N. A file is written under another name, renamed, and
never changed; it goes once the client has a newer one and no checkpoint names it. So whatever moment a run is stopped
at, the files its checkpoint names are there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fed.errors import FedError
from fed.files import replacing
from fed.types import Factors

FOLDER = "clients"

V = TypeVar("V")


class ClientState(NamedTuple):
    """What a client keeps of a round: what its method remembers, its own head, and the factors it ended with."""

    memory: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    ends: Mapping[str, Factors]


class ClientFile(NamedTuple):
    """A client's file: the round it was written after, and the fields of `ClientState` that are not empty in it."""

    round: int
    fields: tuple[str, ...]


class LazyMapping(Mapping[str, V]):
    """One field of a client's file, read whenever it is asked: it costs no memory while nobody does."""

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
    """The files of a run's clients, below `directory`; tensors are read onto `device`.

    What was read last stays in memory until another client's is read.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.folder = directory / FOLDER
        self._device = device
        self._entries: dict[int, ClientFile] = {}
        self._checkpoint = -1  # the round of the last checkpoint: older files may be named by it
        self._superseded: list[Path] = []
        self._last: tuple[Path, ClientState] | None = None

    @property
    def entries(self) -> Mapping[int, ClientFile]:
        """Every client's file as it stands, by the client's id; those that keep nothing have none."""
        return self._entries

    def keep(self, client: int, number: int, kept: ClientState) -> ClientState:
        """Write what a client keeps after round `number`, and return it as mappings that read it when asked.

        Raises FedError where it cannot be written.
        """
        fields = tuple(field for field in ClientState._fields if getattr(kept, field))
        before = self._entries.pop(client, None)
        if fields:
            self._write(self._path(client, number), _flat(kept))
            self._entries[client] = ClientFile(number, fields)
        if before is not None:
            self._supersede(client, before)
        return self.stored(client)

    def stored(self, client: int) -> ClientState:
        """Return what a client kept last as mappings that read it when asked; empty ones where it kept nothing."""
        if client not in self._entries:
            return ClientState({}, {}, {})
        number, fields = self._entries[client]
        return ClientState(
            *(LazyMapping(self, client, number, field) if field in fields else {} for field in ClientState._fields)
        )

    def read(self, client: int, number: int) -> ClientState:
        """Return what a client kept after round `number`; FedError where its file is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

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
        """Take note that a checkpoint of round `number` names the files as they stand; what it no longer needs goes."""
        self._checkpoint = number
        for path in self._superseded:
            path.unlink(missing_ok=True)
        self._superseded = []

    def adopt(self, number: int, entries: Mapping[int, ClientFile]) -> None:
        """Go on from the files a checkpoint of round `number` names; all others go. FedError where one is missing."""
        wanted = {self._path(client, entry.round).name: client for client, entry in entries.items()}
        there = {path.name for path in self.folder.glob("*")}
        if missing := sorted(wanted.keys() - there):
            raise FedError(
                f"{str(self.folder / missing[0])!r} is missing: the checkpoint of round {number} needs what client "
                f"{wanted[missing[0]]} kept; start the run anew"
            )
        for name in there - wanted.keys():
            (self.folder / name).unlink()
        self._entries, self._checkpoint = dict(entries), number

    def clear(self) -> None:
        """Remove all files, and the directory if it is empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _path(self, client: int, number: int) -> Path:
        return self.folder / f"client-{client}.round-{number}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
            with replacing(path) as temporary:
                save_file(own, temporary)
        except (OSError, SafetensorError) as error:
            raise FedError(f"{str(path)!r}, what a client keeps, cannot be written: {error}") from None

    def _supersede(self, client: int, entry: ClientFile) -> None:
        path = self._path(client, entry.round)
        if entry.round > self._checkpoint:
            path.unlink(missing_ok=True)
        else:
            self._superseded.append(path)


@contextmanager
def client_store(directory: Path, device: torch.device, lasting: bool) -> Iterator[ClientStore]:
    """Open the store of a run below `directory`; where it is not `lasting` nothing is left of it in the end."""
    store = ClientStore(directory, device)
    try:
        yield store
    finally:
        if not lasting:
            store.clear()


def flat_factors(prefix: str, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return every A and B by name, `PREFIX/A/MATRIX` and `PREFIX/B/MATRIX`."""
    return {
        f"{prefix}/{side}/{matrix}": factor
        for matrix, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `PREFIX/`, by the rest of the name."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def group_factors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Factors]:
    """Return what `flat_factors` made flat."""
    up = group(tensors, f"{prefix}/B")
    return {matrix: (A, up[matrix]) for matrix, A in group(tensors, f"{prefix}/A").items()}


def _flat(kept: ClientState) -> dict[str, Tensor]:
    named = {f"{field}/{name}": value for field in ("memory", "head") for name, value in getattr(kept, field).items()}
    return named | flat_factors("ends", kept.ends)


def _kept(tensors: Mapping[str, Any]) -> ClientState:
    return ClientState(group(tensors, "memory"), group(tensors, "head"), group_factors(tensors, "ends"))
