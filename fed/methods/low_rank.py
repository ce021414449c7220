"""Operations on stacks of modules for the aggregation of methods: joining, folding into the base, and SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fed.methods.average import next_round
from fed.types import ClientUpdate, Factors, ServerState, Stack


def stacked(updates: Sequence[ClientUpdate], matrix: str, shares: Sequence[float | Sequence[float]]) -> Stack:
    """Return the modules of all updates in one stack, A (Σ r_i, K) and B (N, Σ r_i).

    `shares` holds the weights of each update's modules: one number for all of them, or one for each.
    """
    pairs = [update.factors[matrix] for update in updates]
    weights = [
        torch.tensor([share] * A.shape[0] if isinstance(share, float) else list(share), dtype=torch.float64)
        for (A, _), share in zip(pairs, shares, strict=True)
    ]
    A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
    return Stack(A, B, torch.cat(weights).to(A.device))


def fold(base_delta: Mapping[str, Tensor], stacks: Mapping[str, Stack]) -> dict[str, Tensor]:
    """Return base_delta + B diag(w) A, (N, K) fp32 for every matrix, computed in fp64 and rounded once."""
    folded = {}
    for matrix, (A, B, weights) in stacks.items():
        delta = (B.double() * weights) @ A.double()
        folded[matrix] = (delta + base_delta[matrix] if matrix in base_delta else delta).float()
    return folded


def principal_state(server: ServerState, updates: Sequence[ClientUpdate], stacks: Mapping[str, Stack]) -> ServerState:
    """Return the next server state, with the stacks' ΔW as modules from `principal_modules` and the head averaged."""
    adapter = server.adapter
    factors = {
        matrix: principal_modules(stack, adapter.scale, adapter.factors[matrix][0][: adapter.rank])
        for matrix, stack in stacks.items()
    }
    return next_round(server, updates, replace(adapter, factors=factors))


def principal_modules(stack: Stack, scale: float, spare: Tensor) -> Factors:
    """Return A (m, K) and B (N, m) with s · B A = B_stack diag(w) A_stack = U Σ Vᵀ, A = Vᵀ and B = U Σ / s.

    With B_stack diag(w) = Q₁T₁ and A_stackᵀ = Q₂T₂, only the small core T₁T₂ᵀ is decomposed, in fp64; the (N, K) matrix
    is never formed. Modules are ordered by decreasing singular value. m is the rank of the product, but at least R.
    Modules beyond the rank have b = 0 and, so that they can be trained, an a orthonormal to the others, from the span
    of the stack and `spare`, (R, K); if K is too small for another such direction, a = 0 as well.
    """
    left = stack.B.double() * stack.weights  # (N, n)
    right = torch.cat([stack.A, spare]).double()  # (n + R, K)
    Q1, T1 = torch.linalg.qr(left)
    Q2, T2 = torch.linalg.qr(right.mT)
    U, sigma, Vh = torch.linalg.svd(T1 @ T2[:, : left.shape[1]].mT, full_matrices=True)
    smallest = sigma[:1] * torch.finfo(torch.float64).eps * max(len(T1), len(T2))
    rank = int((sigma > smallest).sum())
    A, B = Vh @ Q2.mT, (Q1 @ U[:, : len(sigma)]) * (sigma / scale)  # (min(K, n + R), K), (N, min(N, n))
    count = max(rank, spare.shape[0])
    return _resized(A, count, dim=0).to(stack.A.dtype), _resized(B[:, :rank], count, dim=1).to(stack.B.dtype)


def _resized(values: Tensor, count: int, dim: int) -> Tensor:
    """Return `values` cut or padded with zeros to the size `count` along `dim`."""
    missing = count - values.shape[dim]
    if missing <= 0:
        return values.narrow(dim, 0, count)
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim)


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return ‖left · right‖_F, a scalar, of left (N, m) and right (m, K).

    With left = Q₁T₁ and rightᵀ = Q₂T₂ it is ‖T₁T₂ᵀ‖_F, because orthogonal factors do not change the norm. This needs
    no (N, K) matrix, and unlike a sum of squares it loses no digits when modules cancel. If m reaches N or K the
    product is formed, because it is then no larger than its factors.
    """
    if left.shape[1] < min(left.shape[0], right.shape[1]):
        left = torch.linalg.qr(left, mode="r").R  # (min(N, m), m)
        right = torch.linalg.qr(right.mT, mode="r").R.mT  # (m, min(K, m))
    norm: Tensor = torch.linalg.matrix_norm(left @ right)
    return norm
