"""Storage on disk for what clients keep between rounds, so that memory holds at most one client's tensors at a time.

`client-I.round-N.safetensors` holds what client I kept after round N. A file is written once and never changed. Before
a checkpoint refers to files they are flushed to the disk. A file is deleted once neither its client nor one of the
checkpoints that are kept refers to it, so the files of both exist whenever a run is interrupted. Its digest, which
checkpoints hold, is compared whenever it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fed.errors import FedError
from fed.files import digest, digest_of, sync
from fed.types import Factors

FOLDER = "clients"
_OWN = re.compile(r"client-\d+\.round-\d+\.safetensors(\.tmp)?")  # earlier versions wrote temporary files as well

V = TypeVar("V")


class ClientState(NamedTuple):
    """What a client keeps after a round: its method's memory, its personal head, and the factors it ended with."""

    memory: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    ends: Mapping[str, Factors]


class ClientFile(NamedTuple):
    """A client's file: the round it was written after, the non-empty fields of the `ClientState` in it, its digest.

    The digest is empty in checkpoints of earlier versions.
    """

    round: int
    fields: tuple[str, ...]
    digest: str = ""


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
        # The entries of the checkpoints that are kept, the older first; before the first one there is none.
        self._checkpoints: list[dict[int, ClientFile]] = []
        self._written: set[Path] = set()  # since the last checkpoint
        self._digests: dict[str, str] = {}  # of the files, by name
        self._last: tuple[Path, ClientState] | None = None

    def keep(self, client: int, number: int, kept: ClientState) -> ClientState:
        """Write what a client keeps after round `number`, and return it as mappings that read the file on access.

        Raises FedError if the file cannot be written.
        """
        fields = tuple(field for field in ClientState._fields if getattr(kept, field))
        before = self.entries.pop(client, None)
        if fields:
            self.entries[client] = ClientFile(number, fields, self._write(self._path(client, number), flat_state(kept)))
        if before is not None and all(checkpoint.get(client) != before for checkpoint in self._checkpoints):
            self._delete(self._path(client, before.round))
        return self.stored(client)

    def stored(self, client: int) -> ClientState:
        """Return what a client kept last as mappings that read its file on access, or empty ones if it kept nothing."""
        if client not in self.entries:
            return ClientState({}, {}, {})
        number, fields, _ = self.entries[client]
        return ClientState(
            *(LazyMapping(self, client, number, field) if field in fields else {} for field in ClientState._fields)
        )

    def read(self, client: int, number: int) -> ClientState:
        """Return what a client kept after round `number`; raise FedError if its file is missing or damaged."""
        path = self._path(client, number)
        if self._last is None or self._last[0] != path:
            self._last = None
            try:
                content = path.read_bytes()
                if self._digests.get(path.name, "") not in ("", digest(content)):
                    raise ValueError("it does not fit its digest")
                tensors = {name: value.to(self._device) for name, value in load(content).items()}
            except (OSError, ValueError, SafetensorError) as error:
                raise FedError(
                    f"{str(path)!r}, what client {client} kept after round {number}, cannot be read: {error}; "
                    "start the run anew"
                ) from None
            self._last = path, state_of(tensors)
        return self._last[1]

    def sync(self) -> None:
        """Flush the files that were written since the last checkpoint to the disk."""
        if self._written:
            sync([*self._written, self.folder, self.folder.parent])
        self._written = set()

    def checkpointed(self) -> None:
        """Record that a checkpoint refers to the current files, and delete those that only older ones refer to."""
        superseded = self._checkpoints[:-1]
        self._checkpoints = [*self._checkpoints[-1:], dict(self.entries)]
        for client, entry in ((client, entry) for entries in superseded for client, entry in entries.items()):
            # Rounds are compared, not names of files: there may be a million, of which a round changes a few.
            if not any(client in kept and kept[client].round == entry.round for kept in self._checkpoints):
                self._delete(self._path(client, entry.round))

    def check(self, number: int, entries: Mapping[int, ClientFile]) -> None:
        """Raise FedError if a file that a checkpoint of round `number` refers to is missing or damaged."""
        for client, entry in entries.items():
            path = self._path(client, entry.round)
            try:
                fault = "damaged" if entry.digest and digest_of(path) != entry.digest else None
            except FileNotFoundError:
                fault = "missing"
            except OSError as error:
                fault = f"not to be read: {error.strerror}"
            if fault is not None:
                raise FedError(
                    f"{str(path)!r} is {fault}: the checkpoint of round {number} needs what client {client} kept"
                )

    def adopt(self, checkpoints: Iterable[Mapping[int, ClientFile]]) -> None:
        """Take over the files of the checkpoints that are kept, the last of which the run goes on from; delete others.

        Only files with names as this class gives them are deleted.
        """
        self._checkpoints = [dict(entries) for entries in checkpoints]
        self.entries = dict(self._checkpoints[-1])
        self._digests = {
            self._path(client, entry.round).name: entry.digest
            for entries in self._checkpoints
            for client, entry in entries.items()
        }
        for path in self._own_files():
            if path.name not in self._digests:
                path.unlink()

    def clear(self) -> None:
        """Delete all clients' files, and then their folder and its parent if they are empty."""
        self._remove(self._own_files())

    def forget(self) -> None:
        """Delete the files that were written since the last checkpoint, to which no checkpoint refers."""
        self._remove(self._written)

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in list(paths):
            path.unlink(missing_ok=True)
        for folder in (self.folder, self.folder.parent):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()

    def _delete(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._digests.pop(path.name, None)
        self._written.discard(path)

    def _own_files(self) -> list[Path]:
        require_real([self.folder.parent, self.folder])
        return [path for path in self.folder.glob("client-*") if _OWN.fullmatch(path.name)]

    def _path(self, client: int, number: int) -> Path:
        return self.folder / f"client-{client}.round-{number}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> str:
        """Write a file, which must be flushed to the disk later, and return its digest."""
        content = save({name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise FedError(f"{str(path)!r}, what a client keeps, cannot be written: {error.strerror}") from None
        self._written.add(path)
        self._digests[path.name] = digest(content)
        return self._digests[path.name]


def require_real(folders: Iterable[Path]) -> None:
    """Raise FedError for a folder that is a symbolic link: what is deleted in it would lie elsewhere."""
    for folder in folders:
        if folder.is_symlink():
            raise FedError(f"{str(folder)!r} is a symbolic link; a run's own folder belongs there")


@contextmanager
def client_store(directory: Path, device: torch.device, lasting: bool) -> Iterator[ClientStore]:
    """Open the store of a run in `directory`; unless it is `lasting`, what it has written is deleted at the end."""
    store = ClientStore(directory, device)
    try:
        yield store
    finally:
        if not lasting:
            store.forget()


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


def flat_state(kept: ClientState) -> dict[str, Tensor]:
    """Return every tensor of what a client keeps by name: `memory/NAME`, `head/NAME`, `ends/A/MATRIX`, …"""
    named = {f"{field}/{name}": value for field in ("memory", "head") for name, value in getattr(kept, field).items()}
    return named | flat_factors("ends", kept.ends)


def state_of(tensors: Mapping[str, Any]) -> ClientState:
    """Return what a client keeps from the tensors that `flat_state` named: its inverse."""
    return ClientState(group(tensors, "memory"), group(tensors, "head"), group_factors(tensors, "ends"))
