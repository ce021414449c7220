"""Weighted means for the aggregation of methods, or what the server's rule makes in their place (`fed.methods.robust`).

All sums are computed in fp64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import plora_kernels as pk
from fed.methods.robust import MEAN, robust_head, robust_modules
from fed.types import Adapter, ClientUpdate, Factors, ServerState


def module_means(server: ServerState, updates: Sequence[ClientUpdate]) -> dict[str, Factors]:
    """Return, for every matrix, A (R, K) and B (N, R) averaged module by module.

    a_j = Σ_{i∈Q_j} p_i a_ij / Σ_{i∈Q_j} p_i, and b_j likewise, with Q_j the clients that trained module j. A module
    that no client trained keeps the server's value bit for bit.
    """
    weights = [update.weight for update in updates]
    means = {}
    for matrix, previous in server.adapter.factors.items():
        sent = []
        for update in updates:
            A, B = update.factors[matrix]  # (r_i, K), (N, r_i)
            sent.append((A, B, torch.tensor(update.selected[matrix], dtype=torch.int64)))
        means[matrix] = pk.module_average(previous, sent, weights)
    return means


def head_means(server: ServerState, updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Return Σ p_i h_i / Σ p_i for every head parameter h, in its dtype; empty if the head is frozen."""
    total = sum(update.weight for update in updates)
    means = {}
    for name, previous in server.head.items():
        mean = torch.zeros_like(previous, dtype=torch.float64)
        for update in updates:
            mean += update.head[name].double() * (update.weight / total)
        means[name] = mean.to(previous.dtype)
    return means


def visit_counts(server: ServerState, updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Return how often each module was trained up to and including this round, (R,) int64 for every matrix."""
    counts = {}
    for matrix, (A, _) in server.adapter.factors.items():
        counts[matrix] = server.visits.get(matrix, torch.zeros(A.shape[0], dtype=torch.int64)).clone()
        for update in updates:
            counts[matrix][list(update.selected[matrix])] += 1
    return counts


def next_round(server: ServerState, updates: Sequence[ClientUpdate], adapter: Adapter) -> ServerState:
    """Return the server after this round: with this adapter, and with the head averaged, or combined by its rule."""
    combined = head_means if server.options.aggregation == MEAN else robust_head
    return replace(server, adapter=adapter, head=combined(server, updates), round=server.round + 1)


def next_state(server: ServerState, updates: Sequence[ClientUpdate], sides: str = "AB") -> ServerState:
    """Return the next server state: modules and head averaged over the clients that trained them.

    `sides` names the factors that were trained, "AB", "A" or "B"; the other factor is kept bit for bit. If the server
    has another rule than the mean (`Options.aggregation`), that takes its place.
    """
    factors: dict[str, Factors] = {}
    if server.options.aggregation != MEAN:
        factors = robust_modules(server, updates, sides)
    else:
        for matrix, mean in module_means(server, updates).items():
            A, B = server.adapter.factors[matrix]
            factors[matrix] = (mean[0] if "A" in sides else A, mean[1] if "B" in sides else B)
    following = next_round(server, updates, replace(server.adapter, factors=factors))
    return replace(following, visits=visit_counts(server, updates))
