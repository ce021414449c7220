"""RoLoRA: odd rounds train and average B with A fixed, even rounds train and average A with B fixed.

In every round one factor is the same for all clients, so aggregation is exact: Σ p_i s B_i A = s B̄ A, and likewise
for s B Ā. Both factors are trained in turn, but only one is sent in each round.

Source: Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", arXiv 2502.01755.
"""

from __future__ import annotations

from collections.abc import Sequence

from fed.methods.average import next_state
from fed.methods.starts import whole_start
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return a start with all R modules, of which one factor is trained.

    A client that took part in the last round downloads only the factor that was averaged then; any other client
    downloads both. Raises `FedError` for a client of another rank.
    """
    number = server.round + 1
    up_to_date = client.last_round == server.round > 0
    return whole_start(server, client, "rolora", _side(number), _side(number - 1) if up_to_date else "AB")


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return the mean of the factor that this round trained; the other one is kept bit for bit."""
    return next_state(server, updates, sides=_side(server.round + 1))


def _side(number: int) -> str:
    return "B" if number % 2 else "A"
