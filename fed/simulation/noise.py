"""Initialisation and aggregation noise of a round, in fp64. ΔW is the total update of an original weight W."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fed.methods.low_rank import product_norm
from fed.types import ClientStart, ClientUpdate, Factors, ServerState


def held_update(weight: Tensor, original: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the ΔW (N, K), fp64, that a layer applies, rounding included: weight − original + s · B A.

    `weight` and `original` are (N, K) in the working dtype and differ by what was folded in; A (r, K) and B (N, r) are
    the modules that the layer computes separately.
    """
    return weight.double() - original.double() + scale * (B.double() @ A.double())


def start_noise(
    server: ServerState, start: ClientStart, changed: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> float:
    """Return √(Σ_matrices ‖ΔW_i(start) − ΔW_server‖_F²) of client i; `init_noise` is the mean over the round's clients.

    `changed` gives (weight, original), (N, K) in the working dtype, for every matrix with something folded into its
    weight. For these the client's ΔW is the one the layer applies, rounding included. For all others both ΔW are
    products, and the norm of their difference is computed from stacked factors, without an (N, K) matrix; it is exactly
    0 if the factors are equal.
    """
    changed = changed or {}
    norms = []
    for matrix, (A, B) in server.adapter.factors.items():
        own_A, own_B = start.factors[matrix]
        if matrix in changed:
            if start.unselected == "folded":
                chosen = list(start.selected[matrix])
                own_A, own_B = own_A[chosen], own_B[:, chosen]
            delta = held_update(*changed[matrix], own_A, own_B, start.scale)
            delta = delta - server.adapter.scale * (B.double() @ A.double())
            base = server.base_delta.get(matrix)
            norms.append(torch.linalg.matrix_norm(delta if base is None else delta - base))
        else:
            norms.append(_difference(start.scale, (own_A, own_B), server.adapter.scale, (A, B)))
    return torch.stack(norms).norm().item()


def _difference(scale: float, one: Factors, other_scale: float, other: Factors) -> Tensor:
    """Return ‖s B A − s' B' A'‖_F; modules that are equal under the same index on both sides cancel exactly."""
    (A, B), (other_A, other_B) = one, other
    shared = min(A.shape[0], other_A.shape[0])
    same = torch.zeros(shared, dtype=torch.bool, device=A.device)
    if scale == other_scale:
        same = (A[:shared] == other_A[:shared]).all(1) & (B[:, :shared] == other_B[:, :shared]).all(0)
    left, right = [], []
    for factor, (down, up) in ((scale, (A, B)), (-other_scale, (other_A, other_B))):
        kept = torch.ones(down.shape[0], dtype=torch.bool, device=A.device)
        kept[:shared] = ~same
        left.append(factor * up[:, kept].double())
        right.append(down[kept].double())
    return product_norm(torch.cat(left, dim=1), torch.cat(right))


def agg_noise(following: ServerState, starts: Sequence[ClientStart], updates: Sequence[ClientUpdate]) -> float:
    """Return √(Σ_matrices ‖ΔW_server − Σ_i p_i ΔW_i(end)‖_F²), where `following` is the server after aggregation.

    ΔW_i(end) = base_delta + s_i B_i A_i over all modules the client ends with. What the round folded into the base is
    a stack of modules too, so the difference is one product of stacked factors, [B_fold diag(w) | s B̄ | −p_1 s_1 B_1 |
    …] [A_fold; Ā; A_1; …]. Modules that clients share and did not train enter once, with the sum of their weights.
    """
    total = sum(update.weight for update in updates)
    norms = []
    for matrix, (A, B) in following.adapter.factors.items():
        left, right = [following.adapter.scale * B.double()], [A.double()]
        if matrix in following.fold:
            stack = following.fold[matrix]
            left.append(stack.B.double() * stack.weights)
            right.append(stack.A.double())
        # Keyed by the id of the start's factors, which clients with the same start share.
        held: dict[int, tuple[Factors, Tensor]] = {}
        for start, update in zip(starts, updates, strict=True):
            share = update.weight / total * start.scale
            trained_A, trained_B = update.factors[matrix]
            left.append(-share * trained_B.double())
            right.append(trained_A.double())
            begun = start.factors[matrix]
            _, weights = held.setdefault(id(begun), (begun, torch.zeros(begun[0].shape[0], dtype=torch.float64)))
            weights[_untrained(start, matrix)] += share
        for (begun_A, begun_B), weights in held.values():
            kept = (weights > 0).to(begun_A.device)
            left.append(-weights.to(begun_B.device)[kept] * begun_B[:, kept].double())
            right.append(begun_A[kept].double())
        norms.append(product_norm(torch.cat(left, dim=1), torch.cat(right)))
    return torch.stack(norms).norm().item()


def _untrained(start: ClientStart, matrix: str) -> list[int]:
    """Return the indices of the modules that a client holds and does not train."""
    selected = set(start.selected[matrix])
    return [module for module in range(start.factors[matrix][0].shape[0]) if module not in selected]


def agg_noise_module(following: ServerState, updates: Sequence[ClientUpdate]) -> float:
    """Return √(Σ_matrices ‖s Σ_j (b̄_j ā_jᵀ − mean_{i∈Q_j} b_ij a_ijᵀ)‖_F²) over modules j that some client trained.

    Q_j are the clients that trained module j. Means are weighted as in aggregation: Σ_{i∈Q_j} p_i … / Σ_{i∈Q_j} p_i.
    """
    scale = following.adapter.scale
    norms = []
    for matrix, (A, B) in following.adapter.factors.items():
        weights = torch.zeros(len(updates), A.shape[0], dtype=torch.float64)
        for row, update in zip(weights, updates, strict=True):
            row[list(update.selected[matrix])] = update.weight
        trained = weights.sum(0) > 0
        shares = weights / weights.sum(0).where(trained, torch.ones(()).double())  # (clients, R)
        left, right = [scale * B[:, trained].double()], [A[trained].double()]
        for share, update in zip(shares.to(A.device), updates, strict=True):
            sent_A, sent_B = update.factors[matrix]
            left.append(-scale * share[list(update.selected[matrix])] * sent_B.double())
            right.append(sent_A.double())
        norms.append(product_norm(torch.cat(left, dim=1), torch.cat(right)))
    return torch.stack(norms).norm().item()


def factor_noise(start: Mapping[str, Factors], previous_end: Mapping[str, Factors]) -> tuple[float, float]:
    """Return one client's ‖A(start) − A(previous end)‖_F over all matrices, and the same for B.

    Modules that only one of the two has count as zero in the other. A round's factor noise is the mean over the clients
    that took part before.
    """
    squares: dict[str, list[Tensor]] = {"A": [], "B": []}
    for matrix, pair in start.items():
        for side, now, before in zip("AB", pair, previous_end[matrix], strict=True):
            rows, earlier = (now, before) if side == "A" else (now.mT, before.mT)  # (modules, width)
            rows, earlier = rows.double(), earlier.to(rows.device).double()
            shared = min(len(rows), len(earlier))
            parts = (rows[:shared] - earlier[:shared], rows[shared:], earlier[shared:])
            squares[side] += [part.square().sum() for part in parts if len(part)]
    moved_A, moved_B = torch.stack([torch.stack(squares[side]).sum() for side in "AB"]).sqrt().tolist()
    return moved_A, moved_B


def end_factors(start: ClientStart, update: ClientUpdate, matrix: str) -> Factors:
    """Return the A (m, K) and B (N, m) that a client ends with: its start with the trained modules replaced.

    Modules that were selected for training but are missing from the update were dropped by the client, and are zero.
    """
    A, B = (factor.clone() for factor in start.factors[matrix])
    trained_A, trained_B = update.factors[matrix]  # (r_i, K), (N, r_i)
    begun = list(start.selected[matrix])
    A[begun], B[:, begun] = 0, 0
    chosen = list(update.selected[matrix])
    A[chosen], B[:, chosen] = trained_A.to(A), trained_B.to(B)
    return A, B
