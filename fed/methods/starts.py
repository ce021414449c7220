"""Starts of clients in methods that select no modules: with all R modules, or with the first r_i of them."""

from __future__ import annotations

from fed.errors import FedError
from fed.types import Client, ClientStart, ServerState


def whole_start(
    server: ServerState, client: Client, method: str, trained: str = "AB", received: str = "AB"
) -> ClientStart:
    """Return a start with all R modules, all of them trained; raise `FedError` for a client of another rank."""
    adapter = server.adapter
    for matrix, (A, _) in adapter.factors.items():
        if A.shape[0] != client.rank:
            raise FedError(
                f"client {client.id} has rank {client.rank}, {matrix} has {A.shape[0]} modules; "
                f"{method} needs every client's rank to equal the adapter's"
            )
    selected = {matrix: tuple(range(A.shape[0])) for matrix, (A, _) in adapter.factors.items()}
    return ClientStart(adapter.factors, selected, adapter.scale, adapter.unselected, trained, received)


def leading_start(server: ServerState, rank: int) -> ClientStart:
    """Return a start with the adapter's first `rank` modules, all of them trained."""
    adapter = server.adapter
    factors = {matrix: (A[:rank], B[:, :rank]) for matrix, (A, B) in adapter.factors.items()}
    selected = {matrix: tuple(range(rank)) for matrix in factors}
    return ClientStart(factors, selected, adapter.scale, adapter.unselected)
