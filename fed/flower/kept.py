"""What a client keeps between rounds on its own machine: in a folder, with a copy in the SuperNode's context."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord
from safetensors import SafetensorError
from safetensors.torch import load, save

from fed.files import make_folder, write_atomically
from fed.flower.records import RecordError, arrays_of, tensors_of
from fed.simulation.client_store import ClientState, flat_state, state_of

_NAME = re.compile(r"client-(\d+)\.round-(\d+)\.safetensors")


class KeptStates:
    """The states of the clients of a machine after the rounds they took part in, in `folder`.

    Those stay from which a server that was stopped may have rounds played again.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    def read(self, client: int, number: int, copy: Any) -> ClientState | None:
        """Return what a client kept after round `number`, from the folder or else from the context's copy.

        Before its first round it has kept nothing. Returns None if what it kept is lost.
        """
        if number == 0:
            return ClientState({}, {}, {})
        try:
            tensors = load(self._path(client, number).read_bytes())
        except (OSError, SafetensorError):
            try:
                tensors = tensors_of(copy, "copy")
            except RecordError:
                return None
        return state_of({name: value.to(self._device) for name, value in tensors.items()})

    def write(self, client: int, number: int, before: int, since: int, kept: ClientState) -> ArrayRecord:
        """Write what a client keeps after round `number`, and return it as a record for the SuperNode's context.

        What it kept after round `before`, from which it trained, stays. The server goes back to the end of round
        `since` at the farthest: what the client kept by then stays as well, and all that is later.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in flat_state(kept).items()}
        make_folder(self._folder)
        write_atomically(self._path(client, number), save(tensors))
        found = [_NAME.fullmatch(path.name) for path in self._folder.glob(f"client-{client}.round-*.safetensors")]
        there = [int(own[2]) for own in found if own]
        first = min(before, max((own for own in there if own <= since), default=0))
        for old in (own for own in there if own < first):
            self._path(client, old).unlink()
        return arrays_of(tensors)

    def _path(self, client: int, number: int) -> Path:
        return self._folder / f"client-{client}.round-{number}.safetensors"
