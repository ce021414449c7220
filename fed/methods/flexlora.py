"""FlexLoRA: the server averages the clients' ΔW at full rank, and a client starts from its best rank-r_i approximation.

ΔW = Σ p_i s B_i A_i = U Σ Vᵀ, kept factored with A = Vᵀ and B = U Σ / s, largest singular value first; client i gets
the first r_i modules. The first round starts from the usual A and B = 0.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024, arXiv 2402.11505.
"""

from __future__ import annotations

from collections.abc import Sequence

from fed.methods.low_rank import principal_state, stacked
from fed.methods.starts import leading_start
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return the first r_i modules, all to be trained."""
    return leading_start(server, client.rank)


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return ΔW = Σ p_i s B_i A_i as modules by falling singular value, as many as there are."""
    total = sum(update.weight for update in updates)
    shares = [update.weight / total * server.adapter.scale for update in updates]
    stacks = {matrix: stacked(updates, matrix, shares) for matrix in server.adapter.factors}
    return principal_state(server, updates, stacks)
