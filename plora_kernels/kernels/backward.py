"""Backward of a PLoRA linear layer: dX, then dA and dB of the selected modules."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import SIDE_FIRST
from .adapted_matmul import adapted_matmul, find_matmul_blocks
from .factor_gradient import factor_gradient_
from .forward import layer_dropout
from .output_gradient import output_gradient_
from .side_product import side_product


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)`; a gradient that is not needed has no elements.

    dx (M, K) = dY W + s·D'((dY B) ⊙ m) A, all modules when `frozen`; dA (R, K) = s((dY B) ⊙ m)ᵀ D(x);
    dB (N, R) = s dYᵀ(S ⊙ m). Shapes: dy (M, N), x (M, K), s (M, places) = S = D(x) Aᵀ as the forward kept it, index
    int32 or None. Rows of dA and columns of dB of unselected modules are zero. D' masks what D masked.
    """
    d_x, d_lora_A, d_lora_B = (dy.new_empty(0) for _ in range(3))  # an operator's outputs may not alias
    applied = None if frozen else index  # the modules that entered y, and so enter dX: the columns of s and ds
    dropout = layer_dropout(index, frozen, dropout_p, dropout_seed)
    make = torch.empty_like if index is None else torch.zeros_like
    if need_B:
        d_lora_B = make(lora_B, memory_format=torch.contiguous_format)
    width = lora_A.shape[0] if applied is None else applied.shape[0]
    blocks = find_matmul_blocks("input_gradient", dy, weight, width) if need_x else None
    ds = None
    # Where dS has a launch of its own, dB comes from the same read of dY.
    reads_once = need_B and dy.shape[0] > 0 and (need_A if blocks is None else blocks.design in SIDE_FIRST)
    if reads_once:
        ds = output_gradient_(d_lora_B, dy, lora_B, s, index=applied, out_index=index, scale=scale)
    if blocks is not None:
        d_x, ds = adapted_matmul(
            dy,
            weight,
            lora_B,
            lora_A,
            bias=None,
            index=applied,
            drop_in=None,
            drop_out=dropout,
            scale=scale,
            side=ds,
            keep_side=need_A,
            blocks=blocks,
        )
    elif need_A and ds is None:
        ds = side_product(dy, lora_B, index=applied, dropout=None)
    thin_index = index if frozen else None
    if need_A:
        assert ds is not None
        d_lora_A = make(lora_A, memory_format=torch.contiguous_format)
        factor_gradient_(d_lora_A, ds, x, thin_index=thin_index, out_index=index, scale=scale, dropout=dropout)
    if need_B and not reads_once:
        factor_gradient_(d_lora_B.t(), s, dy, thin_index=thin_index, out_index=index, scale=scale)
    return d_x, d_lora_A, d_lora_B
