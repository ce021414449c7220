"""The operators in plain torch, fused in algebra: what runs on CPU and wherever Triton does not.

One base matmul, then one in-place rank-R update of its result; the selected modules are gathered compact first and
S = x Aᵀ is kept for the backward. Against the textbook form this saves three passes over (M, N) and one over (M, K).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _gather(lora_A: Tensor, lora_B: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the indexed modules as A (W, K) and B (N, W); a place whose index is −1 holds zeros."""
    if index is None:
        return lora_A, lora_B
    modules, absent = index.clamp_min(0), index < 0
    return (
        lora_A.index_select(0, modules).masked_fill_(absent[:, None], 0.0),
        lora_B.index_select(1, modules).masked_fill_(absent, 0.0),
    )


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    scale: float,
    keep_s: bool,
) -> tuple[Tensor, Tensor]:
    """Return `(y, s)` as the kernel of the same name: y (M, N), s (M, places) or empty."""
    y = functional.linear(x, weight, bias)
    A, B = _gather(lora_A, lora_B, index)
    s = x @ A.t()  # (M, places)
    if y.numel() and s.numel():
        y.addmm_(s, B.t(), alpha=scale)
    return y, s if keep_s else x.new_empty(0)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    index: Tensor | None,
    scale: float,
    frozen: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)` as the kernel of the same name; a gradient that is not needed has no elements."""
    d_x, d_lora_A, d_lora_B, ds = (dy.new_empty(0) for _ in range(4))  # an operator's outputs may not alias
    A, B = _gather(lora_A, lora_B, None if frozen else index)
    if need_x or need_A:
        ds = dy @ B  # (M, places)
    if need_x:
        d_x = dy @ weight
        if d_x.numel() and ds.numel():
            d_x.addmm_(ds, A, alpha=scale)
    # Frozen: every module entered y, the selected ones alone get a gradient.
    picked = index.clamp_min(0) if frozen and index is not None else None
    if need_A:
        ds = ds if picked is None else ds.index_select(1, picked)
        d_lora_A = _scatter((ds.t() @ x).mul_(scale), index, lora_A.shape[0])
    if need_B:
        s = s if picked is None else s.index_select(1, picked)
        # (Sᵀ dY)ᵀ runs about twice as fast as dYᵀ S in the CPU's matmul: the long axis stays contiguous.
        d_lora_B = _scatter((s.t() @ dy).mul_(scale), index, lora_B.shape[1]).t().contiguous()
    return d_x, d_lora_A, d_lora_B


def _scatter(gradient: Tensor, index: Tensor | None, rank: int) -> Tensor:
    """Return (R, D) with row t of `gradient` at module index[t] and zeros elsewhere."""
    if index is None:
        return gradient
    # One spare row takes what belongs to no module, so that no place has to be read on the host.
    out = gradient.new_zeros(rank + 1, gradient.shape[1])
    out[torch.where(index < 0, rank, index).long()] = gradient
    return out[:rank]


def fold_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float) -> None:
    """Add s·Σ_j b_j a_jᵀ over the indexed modules (None: all) to weight (N, K), in place."""
    A, B = _gather(lora_A, lora_B, index)
    if weight.numel() and A.numel():
        weight.addmm_(B, A, alpha=scale)
