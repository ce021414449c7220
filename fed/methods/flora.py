"""FLoRA: clients train new factors of their own rank each round, and the server folds all of them into the base.

ΔW += Σ p_i s_i B_i A_i, with s_i = α/r_i, or α/√r_i if rank-stabilised. This is one product of stacked factors,
[p_1 s_1 B_1 | …] [A_1; …], so it is exact for any mix of ranks. Every client downloads the stack of Σ r_i modules.

Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024, arXiv 2409.05976.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fed.methods.average import next_round
from fed.methods.low_rank import fold, stacked
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return a start with r_i new modules, all of them trained: A Kaiming-uniform, as in a new adapter, and B = 0.

    They are drawn from the shared seed, so the client downloads no modules.
    """
    adapter, rank = server.adapter, client.rank
    factors = {
        matrix: (_fresh(A, rank, rng, matrix), torch.zeros_like(B[:, :1]).repeat(1, rank))
        for matrix, (A, B) in adapter.factors.items()
    }
    selected = {matrix: tuple(range(rank)) for matrix in factors}
    return ClientStart(factors, selected, adapter.scale_of(rank), adapter.unselected, received="")


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return the server with Σ p_i s_i B_i A_i folded into the base; its adapter stays at B = 0."""
    total = sum(update.weight for update in updates)
    shares = [update.weight / total * server.adapter.scale_of(update.client.rank) for update in updates]
    stacks = {matrix: stacked(updates, matrix, shares) for matrix in server.adapter.factors}
    following = next_round(server, updates, server.adapter)
    return replace(following, base_delta=fold(server.base_delta, stacks), fold=stacks)


def _fresh(like: Tensor, rank: int, rng: ClientRandom, matrix: str) -> Tensor:
    """Return a random A (rank, K), uniform in [−1/√K, 1/√K), in the dtype and on the device of `like` (R, K)."""
    width = like.shape[1]
    numbers = torch.from_numpy(rng.uniform(rank * width, "fresh", matrix)).view(rank, width)
    return ((2 * numbers - 1) / math.sqrt(width)).to(like)
