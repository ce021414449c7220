"""raFLoRA: FlexLoRA whose server averages every module over those clients alone that have it.

Averaged over everybody, module j of a few large clients is divided by all of them and ΔW drifts to the smallest rank.
Here the updates are cut at the ranks there are; a slice is averaged over the clients whose rank reaches it, with their
weights renormalised: ΔW = Σ_i Σ_{j<r_i} (p_i / Σ_{k: r_k>j} p_k) s b_ij a_ijᵀ. Then as FlexLoRA.

Source: Wu et al., arXiv 2602.13486, 2026.
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
    """Return the sum of the slices' means as modules by falling singular value, as many as there are."""
    scale = server.adapter.scale
    widest = max(update.client.rank for update in updates)
    reach = [sum(update.weight for update in updates if update.client.rank > module) for module in range(widest)]
    shares = [[update.weight / reach[module] * scale for module in range(update.client.rank)] for update in updates]
    stacks = {matrix: stacked(updates, matrix, shares) for matrix in server.adapter.factors}
    return principal_state(server, updates, stacks)
