"""Frobenius norms of low-rank products, without the products."""

from __future__ import annotations

import torch
from torch import Tensor


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return ‖left · right‖_F, a scalar, of left (N, m) and right (m, K) without forming what is larger.

    With left = Q₁T₁ and rightᵀ = Q₂T₂ it is ‖T₁T₂ᵀ‖_F: orthogonal factors do not change the norm, and
    nothing is squared before it is subtracted. Where m reaches N or K the product itself is no larger, and is taken.
    """
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        dense: Tensor = torch.linalg.matrix_norm(left @ right)
        return dense
    T1 = torch.linalg.qr(left, mode="r").R  # (min(N, m), m)
    T2 = torch.linalg.qr(right.mT, mode="r").R  # (min(K, m), m)
    norm: Tensor = torch.linalg.matrix_norm(T1 @ T2.mT)
    return norm
