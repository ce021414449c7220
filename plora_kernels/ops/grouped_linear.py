"""`plora::grouped_linear` as a torch operator: C groups of rows, each with its own modules, over one weight or C.

    y_g = x_g Wᵀ + bias + s_g·((D(x_g) A_gᵀ) ⊙ m_g) B_gᵀ            for the rows of every group g
    y_g = x_g W_gᵀ + bias_g + s_g·((D(x_g) A_gᵀ) ⊙ m_g) B_gᵀ        if the weight is (C, N, K) and the bias (C, N)

It takes checked tensors, selections as index buffers (C, W) and offsets (C+1,); `plora_kernels.functional` checks them.
Offsets on the host are validated here, because every call passes through here. The kernels do not read offsets on a
device on the host; the torch path does.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from plora_kernels.backend import fallback_to_torch, runs_kernels
from plora_kernels.checks import host_bounds
from plora_kernels.dispatch import define, is_watched, keeps_s, refuse_transforms
from plora_kernels.fallback import grouped_linear as fallback
from plora_kernels.fallback import grouped_products


def _places(lora_A: Tensor, index: Tensor | None, frozen: bool) -> int:
    """Return the number of columns of S: one per module, or one per entry of a group's index."""
    return lora_A.shape[1] if frozen or index is None else index.shape[1]


def _run_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return `(y, s)` of rows x (M, K) by the kernels or by torch."""
    offsets = arguments[5]  # after weight, lora_A, lora_B, bias and the index
    bounds = host_bounds(offsets, x.shape[0]) if offsets.device.type == "cpu" else None
    if runs_kernels(x):
        with fallback_to_torch("the grouped forward", x):
            from plora_kernels.kernels import grouped_linear as kernels

            return kernels.forward(x, *arguments)
    arguments = *arguments[:5], bounds or host_bounds(offsets, x.shape[0]), *arguments[6:]
    return fallback.forward(x, *arguments)


def _run_backward(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)` of rows dy (M, N) by the kernels or by torch."""
    if runs_kernels(dy):
        with fallback_to_torch("the grouped backward", dy):
            from plora_kernels.kernels import grouped_linear as kernels

            d_x, d_lora_A, d_lora_B = kernels.backward(dy, x, *arguments)
            return d_x, d_lora_A, d_lora_B
    arguments = *arguments[:5], host_bounds(arguments[5], x.shape[0]), *arguments[6:]
    return fallback.backward(dy, x, *arguments)


def _bias_gradient(dy: Tensor, weight: Tensor, index: Tensor | None, offsets: Tensor, scales: Tensor | None) -> Tensor:
    """Return Σ_rows dy, (N,), or the sums of each group's rows (C, N) if every group has its own weight."""
    if weight.dim() == 2:
        return dy.sum(0)
    if runs_kernels(dy):
        with fallback_to_torch("the gradient of a grouped bias", dy):
            from plora_kernels.kernels import grouped_linear as kernels

            return kernels.bias_gradient(dy, dy.new_ones(dy.shape[0], 1), offsets)
    return fallback.bias_gradient(dy, fallback.equal_groups(tuple(host_bounds(offsets, dy.shape[0]))))


_call = define(
    "grouped_linear",
    "Tensor? index, Tensor offsets, Tensor? scales",
    "Tensor? dropout_seeds, Tensor? dropout_rows",
    _run_forward,
    _run_backward,
    _places,
    _bias_gradient,
)


def linear(
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
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> Tensor:
    """Return y (…, N) of `plora::grouped_linear`, differentiable; S is kept if the backward needs it for dB."""
    refuse_transforms(x, weight, lora_A, lora_B, bias)
    operands = x, weight, lora_A, lora_B
    if grouped_products.serves(*operands, index, dropout_p) and not is_watched(*operands):
        bounds = tuple(host_bounds(offsets, math.prod(x.shape[:-1])))
        form = grouped_products.GroupLayout.of(bounds, scale, scales, lora_A)
        return grouped_products.ProductPlan.of(x, weight, lora_A.shape[1], form, lora_A.shape[0]).apply(*operands, bias)
    return _call(
        x, weight, lora_A, lora_B, bias, index, offsets, scales, scale, frozen, keeps_s(lora_B), dropout_p,
        dropout_seeds, dropout_rows,
    )  # fmt: skip
