"""FedIT: every client trains the whole adapter, and the factors are averaged: Ā = Σ p_i A_i, B̄ = Σ p_i B_i.

Source: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

from fed.methods.average import next_state
from fed.methods.starts import whole_start
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return a start with all R modules, all of them trained; raise `FedError` for a client of another rank."""
    return whole_start(server, client, "fedit")


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return Ā = Σ p_i A_i and B̄ = Σ p_i B_i, which module-wise means are if all clients train all modules."""
    return next_state(server, updates)
