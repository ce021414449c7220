"""The methods on dense matrices in float64 NumPy: slow, plain, and without code of `fed`.

Every function takes the server before a round and the round's updates and returns ΔW (N, K) of one matrix after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fed.types import ClientUpdate, Factors, ServerState

Dense = NDArray[np.float64]
Reference = Callable[[ServerState, Sequence[ClientUpdate], str], Dense]


def arrays(factors: Factors) -> tuple[Dense, Dense]:
    A, B = factors
    return A.double().numpy(), B.double().numpy()


def held(server: ServerState, matrix: str) -> Dense:
    """Return ΔW (N, K) of the server: its change of the base plus the adapter's part."""
    A, B = arrays(server.adapter.factors[matrix])
    delta = server.adapter.scale * B @ A
    return delta + server.base_delta[matrix].double().numpy() if matrix in server.base_delta else delta


def shares(updates: Sequence[ClientUpdate]) -> list[float]:
    total = sum(update.weight for update in updates)
    return [update.weight / total for update in updates]


def mean_of_products(server: ServerState, updates: Sequence[ClientUpdate], matrix: str) -> Dense:
    """Return Σ p_i s B_i A_i: FlexLoRA, and the target of every exact method."""
    total = 0.0
    for share, update in zip(shares(updates), updates, strict=True):
        A, B = arrays(update.factors[matrix])
        total = total + share * server.adapter.scale * B @ A
    return np.asarray(total)


def product_of_means(server: ServerState, updates: Sequence[ClientUpdate], matrix: str) -> Dense:
    """Return s B̄ Ā: FedIT, FFA-LoRA, RoLoRA, and FedSA-LoRA's global model."""
    pairs = [arrays(update.factors[matrix]) for update in updates]
    A = sum(share * pair[0] for share, pair in zip(shares(updates), pairs, strict=True))
    B = sum(share * pair[1] for share, pair in zip(shares(updates), pairs, strict=True))
    return np.asarray(server.adapter.scale * B @ A)


def fed_plora(server: ServerState, updates: Sequence[ClientUpdate], matrix: str) -> Dense:
    A, B = arrays(server.adapter.factors[matrix])
    total = np.zeros((len(B), A.shape[1]))
    for module in range(len(A)):
        a, b, weight = np.zeros(A.shape[1]), np.zeros(len(B)), 0.0
        for update in updates:
            if module in update.selected[matrix]:
                place = update.selected[matrix].index(module)
                own_A, own_B = arrays(update.factors[matrix])
                a, b = a + update.weight * own_A[place], b + update.weight * own_B[:, place]
                weight += update.weight
        a, b = (a / weight, b / weight) if weight else (A[module], B[:, module])
        total += server.adapter.scale * np.outer(b, a)
    return total


def flora(server: ServerState, updates: Sequence[ClientUpdate], matrix: str) -> Dense:
    total = held(server, matrix)
    alpha = server.adapter.scale * server.adapter.rank
    for share, update in zip(shares(updates), updates, strict=True):
        A, B = arrays(update.factors[matrix])
        total = total + share * alpha / len(A) * B @ A
    return total


def fedex_lora(server: ServerState, updates: Sequence[ClientUpdate], matrix: str) -> Dense:
    A, B = arrays(server.adapter.factors[matrix])
    base = held(server, matrix) - server.adapter.scale * B @ A
    return base + mean_of_products(server, updates, matrix)


def hetlora(server: ServerState, updates: Sequence[ClientUpdate], matrix: str) -> Dense:
    wide, pairs = server.adapter.rank, [arrays(update.factors[matrix]) for update in updates]
    weights = np.array([np.linalg.norm(B @ A) for A, B in pairs])
    if server.options.hetlora_weighting == "run":
        weights = np.array([update.weight for update in updates])
    weights = weights / weights.sum()
    A = sum(w * np.pad(A, ((0, wide - len(A)), (0, 0))) for w, (A, _) in zip(weights, pairs, strict=True))
    B = sum(w * np.pad(B, ((0, 0), (0, wide - B.shape[1]))) for w, (_, B) in zip(weights, pairs, strict=True))
    return np.asarray(server.adapter.scale * B @ A)


def raflora(server: ServerState, updates: Sequence[ClientUpdate], matrix: str) -> Dense:
    """Return a weighted mean for each slice between distinct ranks, over the clients whose rank covers it."""
    ranks = [len(update.factors[matrix][0]) for update in updates]
    total, low = 0.0, 0
    for high in sorted(set(ranks)):
        group = [update for update, rank in zip(updates, ranks, strict=True) if rank >= high]
        weight = sum(update.weight for update in group)
        for update in group:
            A, B = arrays(update.factors[matrix])
            total = total + update.weight / weight * server.adapter.scale * B[:, low:high] @ A[low:high]
        low = high
    return np.asarray(total)


REFERENCES: dict[str, Reference] = {
    "fed-plora": fed_plora,
    "fedit": product_of_means,
    "flora": flora,
    "flexlora": mean_of_products,
    "hetlora": hetlora,
    "ffa-lora": product_of_means,
    "fedex-lora": fedex_lora,
    "fedsa-lora": product_of_means,
    "rolora": product_of_means,
    "raflora": raflora,
}
