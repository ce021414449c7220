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

from . import torch_grouped
from .backend import falling_back, runs_kernels
from .errors import UnsupportedError
from .group_checks import host_bounds
from .ops import _library, _rows, _watched

_library.define(
    "grouped_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? index, "
    "Tensor offsets, Tensor? scales, float scale, bool frozen, bool keep_s, bool merged, float dropout_p, "
    "Tensor? dropout_seeds, Tensor? dropout_rows) -> (Tensor y, Tensor s)"
)
_library.define(
    "grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, "
    "Tensor? index, Tensor offsets, Tensor? scales, float scale, bool frozen, bool merged, bool need_x, bool need_A, "
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
    merged: bool,
    *dropout: Any,
) -> tuple[Tensor, Tensor]:
    """Return `(y, s)` of rows x (M, K) by the kernels or by torch."""
    operands, form = (x, weight, lora_A, lora_B, bias, index), (scales, scale, frozen, keep_s)
    bounds = host_bounds(offsets, x.shape[0]) if offsets.device.type == "cpu" else None
    if not merged and runs_kernels(x):
        with falling_back("the grouped forward", x):
            from .kernels import grouped_layer

            return grouped_layer.forward(*operands, offsets, *form, *dropout)
    bounds = bounds or host_bounds(offsets, x.shape[0])
    return torch_grouped.forward(*operands, bounds, *form, merged, *dropout)


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
    merged: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)` of rows dy (M, N) by the kernels or by torch."""
    operands, form = (dy, x, weight, lora_A, lora_B, s, index), (scales, scale, frozen)
    if not merged and runs_kernels(dy):
        with falling_back("the grouped backward", dy):
            from .kernels import grouped_layer

            return grouped_layer.backward(*operands, offsets, *form, *rest)
    return torch_grouped.backward(*operands, host_bounds(offsets, x.shape[0]), *form, merged, *rest)


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
    merged: bool,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, s = _run_forward(
        _rows(x), weight, lora_A, lora_B, bias, index, offsets, scales, scale, frozen, keep_s, merged, dropout_p,
        dropout_seeds, dropout_rows,
    )  # fmt: skip
    # Not a view: autograd lets no one write in place to a view that a custom function returns.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0])), s


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
    merged: bool,
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
    merged: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_bias: bool,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy_rows, x_rows = _rows(dy), _rows(x)
    d_x, d_lora_A, d_lora_B = _run_backward(
        dy_rows, x_rows, weight, lora_A, lora_B, s, index, offsets, scales, scale, frozen, merged, need_x, need_A,
        need_B, dropout_p, dropout_seeds, dropout_rows,
    )  # fmt: skip
    d_bias = dy_rows.sum(0) if need_bias else dy.new_empty(0)
    return d_x.view(x.shape) if need_x else d_x, d_lora_A, d_lora_B, d_bias


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
    merged: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_bias: bool,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = (0,)
    return (
        x.new_empty(x.shape if need_x else nothing),
        x.new_empty(lora_A.shape if need_A else nothing),
        x.new_empty(lora_B.shape if need_B else nothing),
        x.new_empty((dy.shape[-1],) if need_bias else nothing),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_A, lora_B, _, index, offsets, scales, scale, frozen, _, merged, dropout_p, *dropout = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, s, index, offsets, scales, *dropout)
    ctx.scale, ctx.frozen, ctx.merged, ctx.dropout_p = scale, frozen, merged, dropout_p


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 15
    x, weight, lora_A, lora_B, s, index, offsets, scales, *dropout = ctx.saved_tensors
    need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    # Called with create_graph=True, the operator records itself, so as to refuse a double backward by name.
    recorded = _watched(dy) or torch.is_grad_enabled()
    backward = torch.ops.plora.grouped_linear_backward if recorded else _linear_backward
    d_x, d_lora_A, d_lora_B, d_bias = backward(
        dy, x, weight, lora_A, lora_B, s, index, offsets, scales, ctx.scale, ctx.frozen, ctx.merged, need_x, need_A,
        need_B, need_bias, ctx.dropout_p, *dropout,
    )  # fmt: skip
    return (
        d_x if need_x else None,
        None,
        d_lora_A if need_A else None,
        d_lora_B if need_B else None,
        d_bias if need_bias else None,
        *(None,) * 10,
    )


def _refuse_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise UnsupportedError("plora_linear has no double backward; call backward without create_graph=True")


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise UnsupportedError("plora_linear does not run under vmap; give x a leading batch axis instead")


for _name in ("plora::grouped_linear", "plora::grouped_linear_backward"):
    torch.library.register_vmap(_name, _refuse_vmap, lib=_library)
torch.library.register_autograd("plora::grouped_linear", _differentiate, setup_context=_save_for_backward, lib=_library)
torch.library.register_autograd("plora::grouped_linear_backward", _refuse_double_backward, lib=_library)


class _EagerLinear(torch.autograd.Function):
    """`plora::grouped_linear` without the operator's dispatch, which costs more than a small layer computes."""

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
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise UnsupportedError("plora_linear does not run under torch.func transforms (vmap, grad, jvp); use autograd")
    grad, (n, k) = torch.is_grad_enabled(), weight.shape
    rows, groups, places = math.prod(x.shape[:-1]), lora_A.shape[0], _places(lora_A, index, frozen)
    merged = not runs_kernels(x) and torch_grouped.is_merged(rows, groups, k, n, places, x.dtype, dropout_p)
    keep_s = grad and lora_B.requires_grad and not merged
    arguments = (
        x, weight, lora_A, lora_B, bias, index, offsets, scales, scale, frozen, keep_s, merged, dropout_p,
        dropout_seeds, dropout_rows,
    )  # fmt: skip
    if _watched(x, weight, lora_A, lora_B):
        y, _ = torch.ops.plora.grouped_linear(*arguments)
    elif grad:
        y, _ = _EagerLinear.apply(*arguments)
    else:
        y, _ = _linear(*arguments)
    return y
