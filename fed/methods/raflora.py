"""raFLoRA: FlexLoRA, but every module is averaged only over the clients that have it.

FlexLoRA averages over all clients, so a module that only a few clients of large rank have is scaled down, and ΔW tends
to the smallest rank. Here the weights for module j are renormalised over the clients whose rank exceeds j:
ΔW = Σ_i Σ_{j<r_i} (p_i / Σ_{k: r_k>j} p_k) s b_ij a_ijᵀ. Everything else, the start too, is as in FlexLoRA.

Source: Wu et al., arXiv 2602.13486, 2026.
"""

from __future__ import annotations

from collections.abc import Sequence

from fed.methods.low_rank import principal_state, stacked
from fed.types import ClientUpdate, ServerState


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return ΔW, with the weights above, as modules in order of decreasing singular value, as many as its rank."""
    scale = server.adapter.scale
    widest = max(update.client.rank for update in updates)
    reach = [sum(update.weight for update in updates if update.client.rank > module) for module in range(widest)]
    shares = [[update.weight / reach[module] * scale for module in range(update.client.rank)] for update in updates]
    stacks = {matrix: stacked(updates, matrix, shares) for matrix in server.adapter.factors}
    return principal_state(server, updates, stacks)
