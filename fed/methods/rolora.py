"""RoLoRA: odd rounds train and average B with A fixed, even rounds A with B fixed.

One factor is the same for all in every round, so the mean of the other is exact: Σ p_i s B_i A = s B̄ A, and likewise
s B Ā. Either factor learns, and half as many bytes travel as when both do.

Source: Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", arXiv 2502.01755.
"""

from __future__ import annotations

from collections.abc import Sequence

from fed.methods.average import next_state
from fed.methods.starts import whole_start
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return all R modules with one factor to be trained; raises `FedError` for a client of another rank.

    A client that took part in the last round lacks only the factor averaged then; any other gets both.
    """
    number = server.round + 1
    up_to_date = client.last_round == server.round > 0
    return whole_start(server, client, "rolora", _side(number), _side(number - 1) if up_to_date else "AB")


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return the mean of the factor this round trained, the other bit for bit as it was."""
    return next_state(server, updates, sides=_side(server.round + 1))


def _side(number: int) -> str:
    return "B" if number % 2 else "A"
