"""`plora::grouped_linear` as a torch operator: C groups of rows, each with its own modules, over one weight.

    y_g = x_g Wᵀ + bias + s_g·((D(x_g) A_gᵀ) ⊙ m_g) B_gᵀ        for the rows of every group g

It takes tensors that were checked, selections as index buffers (C, W) and offsets (C+1,); `functional` does the
checking. Offsets on the host are validated here, where every way to call passes; those on a device are not read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from plora_kernels.backend import fallback_to_torch, runs_kernels
from plora_kernels.checks import host_bounds
from plora_kernels.dispatch import (
    Gradients,
    _library,
    _rows,
    _watched,
    all_gradients,
    as_autograd_takes,
    call,
    fake_gradients,
    is_recorded,
    refuse_transforms,
    register,
    shaped_as,
)
from plora_kernels.fallback import grouped_linear as fallback
from plora_kernels.fallback import grouped_products

_library.define(
    "grouped_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? index, "
    "Tensor offsets, Tensor? scales, float scale, bool frozen, bool keep_s, float dropout_p, "
    "Tensor? dropout_seeds, Tensor? dropout_rows) -> (Tensor y, Tensor s)"
)
_library.define(
    "grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, "
    "Tensor? index, Tensor offsets, Tensor? scales, float scale, bool frozen, bool need_x, bool need_A, "
    "bool need_B, bool need_bias, float dropout_p, Tensor? dropout_seeds, Tensor? dropout_rows) "
    "-> (Tensor d_x, Tensor d_lora_A, Tensor d_lora_B, Tensor d_bias)"
)


def _run_forward(
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
    *dropout: Any,
) -> tuple[Tensor, Tensor]:
    """Return `(y, s)` of rows x (M, K) by the kernels or by torch."""
    operands, form = (x, weight, lora_A, lora_B, bias, index), (scales, scale, frozen, keep_s)
    bounds = host_bounds(offsets, x.shape[0]) if offsets.device.type == "cpu" else None
    if runs_kernels(x):
        with fallback_to_torch("the grouped forward", x):
            from plora_kernels.kernels import grouped_linear as kernels

            return kernels.forward(*operands, offsets, *form, *dropout)
    bounds = bounds or host_bounds(offsets, x.shape[0])
    return fallback.forward(*operands, bounds, *form, *dropout)


def _run_backward(
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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)` of rows dy (M, N) by the kernels or by torch."""
    operands, form = (dy, x, weight, lora_A, lora_B, s, index), (scales, scale, frozen)
    if runs_kernels(dy):
        with fallback_to_torch("the grouped backward", dy):
            from plora_kernels.kernels import grouped_linear as kernels

            d_x, d_lora_A, d_lora_B = kernels.backward(*operands, offsets, *form, *rest)
            return d_x, d_lora_A, d_lora_B
    return fallback.backward(*operands, host_bounds(offsets, x.shape[0]), *form, *rest)


@torch.library.impl(_library, "grouped_linear", "CompositeExplicitAutograd")
def _linear(
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
    y, s = _run_forward(
        _rows(x), weight, lora_A, lora_B, bias, index, offsets, scales, scale, frozen, keep_s, dropout_p,
        dropout_seeds, dropout_rows,
    )  # fmt: skip
    return shaped_as(x, y), s


@torch.library.register_fake("plora::grouped_linear", lib=_library)
def _linear_fake(
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
    s = x.new_empty((math.prod(x.shape[:-1]), _places(lora_A, index, frozen)) if keep_s else (0,))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), s


def _places(lora_A: Tensor, index: Tensor | None, frozen: bool) -> int:
    """Return the number of columns of S: every module, or one per entry of a group's index."""
    return lora_A.shape[1] if frozen or index is None else index.shape[1]


@torch.library.impl(_library, "grouped_linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
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
    need_bias: bool,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> Gradients:
    dy_rows, needs = _rows(dy), (need_x, need_A, need_B)
    gradients = _run_backward(
        dy_rows, _rows(x), weight, lora_A, lora_B, s, index, offsets, scales, scale, frozen, *needs, dropout_p,
        dropout_seeds, dropout_rows,
    )  # fmt: skip
    return all_gradients(gradients, dy_rows, x, need_x, need_bias)


@torch.library.register_fake("plora::grouped_linear_backward", lib=_library)
def _linear_backward_fake(
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
    need_bias: bool,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> Gradients:
    return fake_gradients(dy, x, lora_A, lora_B, need_x, need_A, need_B, need_bias)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_A, lora_B, _, index, offsets, scales, scale, frozen, _, dropout_p, *dropout = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, s, index, offsets, scales, *dropout)
    ctx.scale, ctx.frozen, ctx.dropout_p = scale, frozen, dropout_p


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None, recorded: bool = False) -> tuple[Tensor | None, ...]:
    if dy is None:
        return as_autograd_takes(ctx, None)
    x, weight, lora_A, lora_B, s, index, offsets, scales, *dropout = ctx.saved_tensors
    need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    needs = need_x, need_A, need_B, need_bias
    backward = torch.ops.plora.grouped_linear_backward if recorded or is_recorded(dy) else _linear_backward
    gradients = backward(
        dy, x, weight, lora_A, lora_B, s, index, offsets, scales, ctx.scale, ctx.frozen, *needs,
        ctx.dropout_p, *dropout,
    )  # fmt: skip
    return as_autograd_takes(ctx, gradients)


register("grouped_linear", _save_for_backward, _differentiate)


class _EagerLinear(torch.autograd.Function):
    """`plora::grouped_linear` without the operator's dispatch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        # Not split into forward and setup_context: torch would inspect the signature anew at every call.
        output = _linear(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


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
    """Return y (…, N) of `plora::grouped_linear`, differentiable; S is kept if dB will want it."""
    refuse_transforms(x, weight, lora_A, lora_B, bias)
    operands = x, weight, lora_A, lora_B
    if grouped_products.serves(*operands, index, dropout_p) and not _watched(*operands):
        bounds = tuple(host_bounds(offsets, math.prod(x.shape[:-1])))
        form = grouped_products.GroupLayout.of(bounds, scale, scales, x)
        return grouped_products.ProductPlan.of(x, weight, lora_A.shape[1], form, lora_A.shape[0]).apply(*operands, bias)
    keep_s = torch.is_grad_enabled() and lora_B.requires_grad
    arguments = (
        x, weight, lora_A, lora_B, bias, index, offsets, scales, scale, frozen, keep_s, dropout_p,
        dropout_seeds, dropout_rows,
    )  # fmt: skip
    return call(torch.ops.plora.grouped_linear, _EagerLinear, _linear, arguments)
