"""FedSA-LoRA: A is shared and averaged; every client keeps its own B.

Models are personal: client i has s B_i Ā. The global model, which is needed for evaluation, has the mean of the B_i.

Source: Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, arXiv 2410.01463.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fed.methods.average import next_state
from fed.methods.starts import whole_start
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return a start with Ā and the client's own B, which is zero before its first round.

    Raises `FedError` for a client of another rank.
    """
    whole = whole_start(server, client, "fedsa-lora", received="A")
    own = {
        matrix: (A, client.memory[matrix] if matrix in client.memory else torch.zeros_like(B))
        for matrix, (A, B) in whole.factors.items()
    }
    return replace(whole, factors=own, sends="A")


def finish(server: ServerState, begun: ClientStart, update: ClientUpdate) -> ClientUpdate:
    """Return the update with only A sent, and B kept in the client's memory."""
    return replace(update, sent="A", memory={matrix: B for matrix, (_, B) in update.factors.items()})


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return Ā = Σ p_i A_i and B̄ = Σ p_i B_i; B̄ serves the global model only, no client starts from it."""
    return next_state(server, updates)
