"""Backward of a PLoRA linear layer: dX in one launch, then dA and dB of the selected modules."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapted_matmul import adapted_matmul
from .factor_gradient import factor_gradient_


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
    """Return `(dx, dA, dB)`; a gradient that is not needed has no elements.

    dx (M, K) = dY W + s((dY B) ⊙ m) A, all modules when `frozen`; dA (R, K) = s((dY B) ⊙ m)ᵀ x;
    dB (N, R) = s dYᵀ(S ⊙ m). Shapes: dy (M, N), x (M, K), s (M, places) = S = x Aᵀ as the forward kept it, index int32
    or None. Rows of dA and columns of dB of unselected modules are zero.
    """
    d_x, d_lora_A, d_lora_B, ds = (dy.new_empty(0) for _ in range(4))  # an operator's outputs may not alias
    applied = None if frozen else index  # the modules that entered y, and so enter dX
    if need_x:
        d_x, ds = adapted_matmul(
            "input_gradient", dy, weight, lora_B, lora_A, bias=None, index=applied, scale=scale, keep_side=need_A
        )
    elif need_A:
        ds = dy @ lora_B  # (M, R), every module: there is no tile of dX to ride on
    # The forward and dX lay their side products out by the index they were given; frozen ones hold every module.
    make = torch.empty_like if index is None else torch.zeros_like
    if need_A:
        ds_index = index if frozen or not need_x else None
        d_lora_A = make(lora_A, memory_format=torch.contiguous_format)
        factor_gradient_(d_lora_A, ds, x, thin_index=ds_index, out_index=index, scale=scale)
    if need_B:
        s_index = index if frozen else None
        d_lora_B = make(lora_B, memory_format=torch.contiguous_format)
        factor_gradient_(d_lora_B.t(), s, dy, thin_index=s_index, out_index=index, scale=scale)
    return d_x, d_lora_A, d_lora_B
