"""FFA-LoRA: A stays at its random initial value, which all clients draw from the shared seed; B̄ = Σ p_i B_i.

As A is the same for all clients, Σ p_i s B_i A = s B̄ A: aggregation is exact, and only B is sent.

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.
"""

from __future__ import annotations

from collections.abc import Sequence

from fed.methods.average import next_state
from fed.methods.starts import whole_start
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return a start with all R modules, of which B is trained; raise `FedError` for a client of another rank."""
    return whole_start(server, client, "ffa-lora", trained="B", received="B")


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return the unchanged A and B̄ = Σ p_i B_i."""
    return next_state(server, updates, sides="B")
