"""A PLoRA linear layer: y in the forward; dX, then dA and dB of the selected modules in the backward."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from plora_kernels.kernels.adapted_matmul import adapted_matmul, find_matmul_blocks
from plora_kernels.kernels.factor_gradient import add_parts_, factor_gradient_, plan_sums, sum_parts_
from plora_kernels.kernels.launch import Dropout
from plora_kernels.kernels.output_gradient import output_gradient_
from plora_kernels.kernels.replay import empty, replayed, zeros
from plora_kernels.kernels.side_product import side_product
from plora_kernels.tuning.blocks import ALGEBRA_DESIGNS, PERSISTENT_DESIGNS, SIDE_FIRST


@replayed
def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    scale: float,
    frozen: bool,
    keep_s: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, s)`: y (M, N) = x Wᵀ + bias + s·((D(x) Aᵀ) ⊙ m) Bᵀ and, if `keep_s`, S (M, W or R) = D(x) Aᵀ.

    Shapes: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R), bias (N,), index (W,) int32 or None for all modules.
    The factors may be in fp32 beside half precision: they are rounded to x's dtype as they are loaded. S is the side
    product (`side_product.py`), in x's dtype. If `frozen`, all R modules enter y, and the index names those that the
    dropout D applies to.
    """
    applied = None if frozen else index
    main, down = weight.t(), lora_A.t()
    y, side = adapted_matmul(
        x,
        main,
        down,
        lora_B.t(),
        bias=bias,
        index=applied,
        drop_in=Dropout.of_layer(index, frozen, dropout_p, dropout_seed),
        scale=scale,
        keep_side=keep_s,
        blocks=find_matmul_blocks(
            "forward",
            x,
            main,
            down,
            down.shape[1] if applied is None else applied.shape[0],
            indexed=applied is not None,
        ),
    )
    return y, side if keep_s or side.numel() == 0 else empty((0,), x.dtype, x.device)


@replayed
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
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return `(dx, dA, dB)`; a gradient that is not needed has no elements.

    dx (M, K) = dY W + s·D'((dY B) ⊙ m) A, over all modules if `frozen`; dA (R, K) = s((dY B) ⊙ m)ᵀ D(x);
    dB (N, R) = s dYᵀ(S ⊙ m). Shapes: dy (M, N), x (M, K), s (M, W or R) = S = D(x) Aᵀ as the forward kept it, index
    (W,) int32 or None. Rows of dA and columns of dB of unselected modules are zero. D' applies the mask of D. dA and dB
    have the factors' dtype: in fp32 they are the sums, not rounded again.
    """
    d_x = None
    applied = None if frozen else index  # the modules that entered y, and so enter dX: the columns of s and ds
    dropout = Dropout.of_layer(index, frozen, dropout_p, dropout_seed)
    make = empty if index is None else zeros
    d_lora_A = make(lora_A.shape, lora_A.dtype, dy.device) if need_A else None
    d_lora_B = make(lora_B.shape, lora_B.dtype, dy.device) if need_B else None
    width = lora_A.shape[0] if applied is None else applied.shape[0]
    blocks = None
    if need_x:
        blocks = find_matmul_blocks("input_gradient", dy, weight, lora_B, width, dropout, indexed=applied is not None)
    # The whole layer by torch's own matmuls.
    if blocks is not None and blocks.design in ALGEBRA_DESIGNS and index is None and dropout is None:
        d_x, side = adapted_matmul(dy, weight, lora_B, lora_A, index=None, scale=scale, keep_side=True, blocks=blocks)
        _gradients_by_torch_(d_lora_A, d_lora_B, dy, x, s, side, scale)
        return _with_empty((d_x, d_lora_A, d_lora_B), dy)
    ds, sums_A, sums_B = None, None, None
    # If dS has its own launch, that launch computes dB from the same read of dY, unless it runs beside that of dX:
    # there is not room enough for it.
    persistent = blocks is not None and blocks.design in PERSISTENT_DESIGNS and blocks.design in SIDE_FIRST
    with_ds = need_A if blocks is None else blocks.design in SIDE_FIRST and not (persistent and blocks.dependent)
    reads_once = with_ds and need_B and dy.shape[0] > 0
    if reads_once and d_lora_B is not None:
        ds = output_gradient_(d_lora_B, dy, lora_B, s, index=applied, out_index=index, scale=scale)
    if blocks is not None:
        places = width if index is None else index.shape[0]
        if persistent and blocks.gradient_beside and places * dy.shape[0] > 0:
            # dA and dB run beside dX where there is room on the multiprocessors.
            if d_lora_A is not None:
                sums_A = plan_sums(d_lora_A, x, places, dropout=dropout, beside=True)
            if d_lora_B is not None and not reads_once:
                sums_B = plan_sums(d_lora_B.t(), dy, places, beside=True)
        d_x, ds = adapted_matmul(
            dy,
            weight,
            lora_B,
            lora_A,
            index=applied,
            drop_out=dropout,
            scale=scale,
            side=ds,
            keep_side=need_A,
            blocks=blocks,
        )
    elif need_A and ds is None:
        ds = side_product(dy, lora_B, index=applied, dropout=None)
    thin_index = index if frozen else None
    if sums_A is not None and ds is not None:
        sum_parts_(
            sums_A,
            ds,
            x,
            thin_index=thin_index,
            out_index=index,
            scale=scale,
            dropout=dropout,
            beside=True,
            leads=sums_B is not None,
        )
    if sums_B is not None:
        sum_parts_(sums_B, s, dy, thin_index=thin_index, out_index=index, scale=scale, beside=True)
    if d_lora_A is not None:
        assert ds is not None
        if sums_A is None:
            factor_gradient_(d_lora_A, ds, x, thin_index=thin_index, out_index=index, scale=scale, dropout=dropout)
        else:
            add_parts_(d_lora_A, sums_A, out_index=index, scale=scale, dropout=dropout)
    if d_lora_B is not None and not reads_once:
        if sums_B is None:
            factor_gradient_(d_lora_B.t(), s, dy, thin_index=thin_index, out_index=index, scale=scale)
        else:
            add_parts_(d_lora_B.t(), sums_B, out_index=index, scale=scale)
    return _with_empty((d_x, d_lora_A, d_lora_B), dy)


def _gradients_by_torch_(
    d_lora_A: Tensor | None, d_lora_B: Tensor | None, dy: Tensor, x: Tensor, s: Tensor, ds: Tensor, scale: float
) -> None:
    """Write dA (R, K) = s·dSᵀ x and dB (N, R) = s·dYᵀ S, those that are not None, by torch's own matmuls.

    fp32 gradients of half precision are not rounded. Where torch has no such products, a kernel computes them.
    """
    for gradient, left, right in ((d_lora_A, ds.t(), x), (d_lora_B, dy.t(), s)):
        if gradient is None:
            continue
        if gradient.dtype is x.dtype:
            gradient.addmm_(left, right, beta=0, alpha=scale)
        elif multiplies_into_fp32(x.device):
            torch.mm(left, right, out_dtype=gradient.dtype, out=gradient).mul_(scale)
        elif gradient is d_lora_A:
            factor_gradient_(gradient, ds, x, thin_index=None, out_index=None, scale=scale)
        else:
            factor_gradient_(gradient.t(), s, dy, thin_index=None, out_index=None, scale=scale)


@functools.cache
def multiplies_into_fp32(device: torch.device) -> bool:
    """Say whether torch multiplies half precision into an unrounded fp32 result: on CUDA from version 2.8 on."""
    return device.type != "cpu" and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype_out")


def _with_empty(gradients: tuple[Tensor | None, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """Return gradients with a tensor in place of each None, one each, because an operator's outputs must not alias."""
    return tuple(empty((0,), dy.dtype, dy.device) if one is None else one for one in gradients)
