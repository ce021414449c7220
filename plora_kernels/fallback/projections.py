"""Projections that share one input, in plain torch: a forward for each, and one dX summed in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from plora_kernels.fallback import linear
from plora_kernels.fallback.linear import factor_gradient, scatter


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
    keep_s: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return y_p (M, N_p) and S_p = x A_pᵀ (M, R_p) of every projection p of rows x (M, K); S is empty if not kept."""
    results = [
        linear.forward(x, weight, lora_A, lora_B, bias, None, scale, False, keep_s, 0.0, None)
        for weight, lora_A, lora_B, bias, scale in zip(weights, lora_As, lora_Bs, biases, scales, strict=True)
    ]
    return [y for y, _ in results], [s for _, s in results]


def input_gradient(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dss: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    """Return dX (M, K) = Σ_p (dY_p W_p + s_p·dS_p A_p)."""
    d_x = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        d_x.addmm_(dy, weight)
    for ds, lora_A, scale in zip(dss, lora_As, scales, strict=True):
        d_x.addmm_(ds, lora_A.to(d_x.dtype), alpha=scale)
    return d_x


def factor_gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    index: Tensor | None,
    scale: float,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dS (M, R) = dY B, dA (R, K) = s·dSᵀ x and dB (N, R) = s·dYᵀ S of one projection; None if not needed."""
    ds, d_lora_A, d_lora_B = dy @ lora_B.to(dy.dtype), None, None
    picked = None if index is None else index.clamp_min(0)
    if need_A:
        thin = ds if picked is None else ds.index_select(1, picked)
        d_lora_A = scatter(factor_gradient(thin, x, scale, lora_A.dtype), index, lora_A.shape[0])
    if need_B:
        thin = s if picked is None else s.index_select(1, picked)
        d_lora_B = scatter(factor_gradient(thin, dy, scale, lora_B.dtype), index, lora_A.shape[0]).t().contiguous()
    return ds, d_lora_A, d_lora_B
