"""HETLoRA: client i trains the first r_i modules; updates are padded with zeros and averaged.

Ā = Σ q_i [A_i; 0] and B̄ = Σ q_i [B_i | 0], with q_i ∝ ‖B_i A_i‖_F for each matrix ("norm") or the run's p_i ("run").
Self-pruning, if switched on: a client of rank r adds λ Σ_matrices ‖A[γr:]‖ ‖B[:, γr:]‖ to its loss. If that sum is
smaller at the end of the round than at the start, the client keeps only the first γr modules from then on.

Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024,
arXiv 2401.06432.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fed.methods.average import next_round
from fed.methods.low_rank import product_norm
from fed.methods.starts import leading_start
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, Factors, ServerState, TailPenalty


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return a start with the first r_i modules, or as many as the client kept after pruning, all of them trained."""
    options = server.options
    rank = int(client.memory["rank"]) if "rank" in client.memory else client.rank
    begun = leading_start(server, rank)
    first = int(options.hetlora_decay * rank)
    if options.hetlora_prune and 1 <= first < rank:
        return replace(begun, penalty=TailPenalty(first, options.hetlora_penalty))
    return begun


def finish(server: ServerState, begun: ClientStart, update: ClientUpdate) -> ClientUpdate:
    """Return the update, cut to γr modules if Σ_matrices ‖A[γr:]‖ ‖B[:, γr:]‖ shrank; the client keeps that rank."""
    first = None if begun.penalty is None else begun.penalty.first
    if first is None or not tail_size(update.factors, first) < tail_size(begun.factors, first):
        return replace(update, memory=update.client.memory)
    return replace(
        update,
        factors={matrix: (A[:first], B[:, :first]) for matrix, (A, B) in update.factors.items()},
        selected={matrix: tuple(range(first)) for matrix in update.selected},
        memory={"rank": torch.tensor(first)},
    )


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return the weighted means of the updates; a module that a client does not have counts as zero."""
    factors = {matrix: _padded_mean(server, updates, matrix) for matrix in server.adapter.factors}
    return next_round(server, updates, replace(server.adapter, factors=factors))


def tail_size(factors: Mapping[str, Factors], first: int) -> float:
    """Return Σ_matrices ‖A[first:]‖_F ‖B[:, first:]‖_F."""
    return sum((A[first:].double().norm() * B[:, first:].double().norm()).item() for A, B in factors.values())


def _padded_mean(server: ServerState, updates: Sequence[ClientUpdate], matrix: str) -> Factors:
    A, B = server.adapter.factors[matrix]
    mean_A, mean_B = torch.zeros_like(A, dtype=torch.float64), torch.zeros_like(B, dtype=torch.float64)
    for update, weight in zip(updates, _weights(server, updates, matrix), strict=True):
        sent_A, sent_B = update.factors[matrix]
        rank = sent_A.shape[0]
        mean_A[:rank] += weight * sent_A.double()
        mean_B[:, :rank] += weight * sent_B.double()
    return mean_A.to(A.dtype), mean_B.to(B.dtype)


def _weights(server: ServerState, updates: Sequence[ClientUpdate], matrix: str) -> Tensor:
    """Return q_i (clients,) fp64 with sum 1; they are the run's p_i if every client's ΔW is 0."""
    weights = torch.tensor([update.weight for update in updates], dtype=torch.float64)
    if server.options.hetlora_weighting == "norm":
        norms = torch.stack([product_norm(B.double(), A.double()) for A, B in (u.factors[matrix] for u in updates)])
        if norms.sum() > 0:
            weights = norms.to(weights)
    return weights / weights.sum()
