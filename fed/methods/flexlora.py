"""FlexLoRA: the server averages the clients' ΔW, and client i starts from the mean's best approximation of rank r_i.

ΔW = Σ p_i s B_i A_i = U Σ Vᵀ is kept as factors, A = Vᵀ and B = U Σ / s, in order of decreasing singular value; client
i receives the first r_i modules. The first round starts from a random A and B = 0.

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
    """Return a start with the first r_i modules, all of them trained."""
    return leading_start(server, client.rank)


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return ΔW = Σ p_i s B_i A_i as modules in order of decreasing singular value, as many as its rank."""
    total = sum(update.weight for update in updates)
    shares = [update.weight / total * server.adapter.scale for update in updates]
    stacks = {matrix: stacked(updates, matrix, shares) for matrix in server.adapter.factors}
    return principal_state(server, updates, stacks)
