"""What methods with one rank for all clients share: everybody holds, and may train, all R modules."""

from __future__ import annotations

from fed.errors import FedError
from fed.types import Client, ClientStart, ServerState


def whole_start(
    server: ServerState, client: Client, method: str, trained: str = "AB", received: str = "AB"
) -> ClientStart:
    """Return all R modules, all to be trained; raises `FedError` for a client of another rank."""
    adapter = server.adapter
    for matrix, (A, _) in adapter.factors.items():
        if A.shape[0] != client.rank:
            raise FedError(
                f"client {client.id} has rank {client.rank}, {matrix} has {A.shape[0]} modules; "
                f"{method} needs every client's rank to equal the adapter's"
            )
    selected = {matrix: tuple(range(A.shape[0])) for matrix, (A, _) in adapter.factors.items()}
    return ClientStart(adapter.factors, selected, adapter.scale, adapter.unselected, trained, received)
