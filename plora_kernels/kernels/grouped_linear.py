"""Forward and backward of a PLoRA linear layer on groups of rows, each with its own modules.

The side products S = D(x_g) A_gᵀ and dS = dY_g B_g are those of `side_product.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plora_kernels.kernels.factor_gradient import factor_gradient_
from plora_kernels.kernels.grouped_matmul import grouped_matmul
from plora_kernels.kernels.grouped_tiles import Groups
from plora_kernels.kernels.launch import Dropout
from plora_kernels.kernels.replay import empty, replayed, zeros
from plora_kernels.kernels.side_product import side_product


def _groups(offsets: Tensor, scales: Tensor | None, scale: float, device: torch.device) -> Groups:
    """Return groups with offsets and scales on the device; copies from the host are asynchronous."""
    if scales is not None:
        scales = (scales * scale).to(device, torch.float32, non_blocking=True)
    return Groups(offsets.to(device, non_blocking=True).contiguous(), scales, 1.0 if scales is not None else scale)


@replayed
def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    offsets: Tensor,
    scales: Tensor | None,
    scale: float,
    frozen: bool,
    keep_s: bool,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, s)`: y (M, N), and if `keep_s` s (M, W or R) = D(x_g) A_gᵀ.

    Shapes: x (M, K), weight (N, K) and bias (N,), or one a group (C, N, K) and (C, N), lora_A (C, R, K), lora_B
    (C, N, R), index (C, W) int32 or None for all modules, offsets (C+1,), scales (C,) times `scale` or None,
    dropout_seeds (C,) int64, dropout_rows (M,) int64 or None, the rows' numbers in their group's mask. If `frozen`, all
    R modules enter y, and the index names those that the dropout D applies to.
    """
    y, s = grouped_matmul(
        x,
        weight.mT,
        lora_A.mT,
        lora_B.mT,
        _groups(offsets, scales, scale, x.device),
        op="forward",
        bias=bias,
        index=None if frozen else index,
        drop_in=Dropout.of_layer(index, frozen, dropout_p, dropout_seeds, dropout_rows),
        keep_side=keep_s,
    )
    return y, s if keep_s or s.numel() == 0 else empty((0,), x.dtype, x.device)


@replayed
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    index: Tensor | None,
    offsets: Tensor,
    scales: Tensor | None,
    scale: float,
    frozen: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return `(dx, dA, dB)`, (M, K), (C, R, K), (C, N, R); a gradient that is not needed has no elements.

    The gradients of unselected modules are zero, and those of fp32 factors fp32 sums, not rounded again; s is the side
    product that the forward kept.
    """
    d_x, d_lora_A, d_lora_B = None, None, None
    groups = _groups(offsets, scales, scale, dy.device)
    applied = None if frozen else index  # the modules that entered y, and so enter dX: the columns of s and ds
    dropout = Dropout.of_layer(index, frozen, dropout_p, dropout_seeds, dropout_rows)
    make = empty if index is None else zeros
    thin_index, ds = index if frozen else None, None
    if need_x:
        d_x, ds = grouped_matmul(
            dy, weight, lora_B, lora_A, groups, op="input_gradient", index=applied, drop_out=dropout, keep_side=need_A
        )
    elif need_A:
        ds = side_product(dy, lora_B, index=applied, dropout=None, groups=groups)
    if need_A and ds is not None:
        d_lora_A = make(lora_A.shape, lora_A.dtype, dy.device)
        factor_gradient_(
            d_lora_A, ds, x, thin_index=thin_index, out_index=index, scale=1.0, dropout=dropout, groups=groups
        )
    if need_B:
        d_lora_B = make(lora_B.shape, lora_B.dtype, dy.device)
        factor_gradient_(d_lora_B.mT, s, dy, thin_index=thin_index, out_index=index, scale=1.0, groups=groups)
    # A tensor for each missing gradient, because an operator's outputs must not alias.
    return tuple(empty((0,), dy.dtype, dy.device) if one is None else one for one in (d_x, d_lora_A, d_lora_B))


@replayed
def bias_gradient(dy: Tensor, ones: Tensor, offsets: Tensor) -> Tensor:
    """Return onesᵀ · dy_g, the sums of each group's rows, (C, N) in dy's dtype, from dy (M, N) and ones (M, 1)."""
    groups = _groups(offsets, None, 1.0, dy.device)
    out = empty((groups.total, dy.shape[1]), dy.dtype, dy.device)
    factor_gradient_(out.unsqueeze(1), ones, dy, thin_index=None, out_index=None, scale=1.0, groups=groups)
    return out
