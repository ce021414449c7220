"""Noise of a round, measured in fp64 on effective weights: ΔW is what is added to the original W."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fed.types import Adapter, ClientStart, ClientUpdate, Factors


def held_update(weight: Tensor, original: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return ΔW: (N, K) fp64, what a layer really adds to its original weight: weight − original + s · B A.

    `weight` and `original` are (N, K) in the working dtype and differ by what was folded; A (r, K) and
    B (N, r) are the modules the layer sums besides.
    """
    return weight.double() - original.double() + scale * (B.double() @ A.double())


def start_noise(server: Adapter, held: Iterable[tuple[str, Tensor]]) -> float:
    """Return √(Σ_matrices ‖ΔW_i(start) − ΔW_server‖_F²) of one client.

    `held` gives the client's ΔW_i(start) (N, K) for every matrix, one at a time. `init_noise` is the mean
    over the round's clients.
    """
    norms = []
    for matrix, delta in held:
        A, B = server.factors[matrix]
        norms.append(torch.linalg.matrix_norm(delta - server.scale * (B.double() @ A.double())))
    return torch.stack(norms).norm().item()


def agg_noise(server: Adapter, starts: Sequence[ClientStart], updates: Sequence[ClientUpdate]) -> float:
    """Return √(Σ_matrices ‖ΔW_server − Σ_i p_i ΔW_i(end)‖_F²), `server` being the adapter after aggregation.

    ΔW_i(end) = s_i B_i A_i over all modules: the trained ones of `updates[i]`, the others as in `starts[i]`.
    The difference is one product of stacked factors, [s B̄ | −p_1 s_1 B_1 | …] [Ā; A_1; …], never formed.
    """
    total = sum(update.weight for update in updates)
    norms = []
    for matrix, (A, B) in server.factors.items():
        left, right = [server.scale * B.double()], [A.double()]
        for start, update in zip(starts, updates, strict=True):
            end_A, end_B = end_factors(start, update, matrix)
            left.append(-update.weight / total * start.scale * end_B.double())
            right.append(end_A.double())
        norms.append(product_norm(torch.cat(left, dim=1), torch.cat(right)))
    return torch.stack(norms).norm().item()


def end_factors(start: ClientStart, update: ClientUpdate, matrix: str) -> Factors:
    """Return A (R, K) and B (N, R) a client ends with: its start, the modules it trained replaced."""
    A, B = (factor.clone() for factor in start.factors[matrix])
    trained_A, trained_B = update.factors[matrix]  # (r_i, K), (N, r_i)
    chosen = list(update.selected[matrix])
    A[chosen], B[:, chosen] = trained_A, trained_B
    return A, B


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return ‖left · right‖_F, a scalar, of left (N, m) and right (m, K) without forming the (N, K) product.

    With left = Q₁T₁ and rightᵀ = Q₂T₂ it is ‖T₁T₂ᵀ‖_F: orthogonal factors do not change the norm, and
    nothing is squared before it is subtracted.
    """
    T1 = torch.linalg.qr(left, mode="r").R  # (min(N, m), m)
    T2 = torch.linalg.qr(right.mT, mode="r").R  # (min(K, m), m)
    norm: Tensor = torch.linalg.matrix_norm(T1 @ T2.mT)
    return norm
