"""`plora::linear` as a torch operator: schemas, fake tensors, autograd, choice of the backend.

It takes tensors that were checked and a selection as an index buffer; `functional` does the checking.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from plora_kernels.backend import fallback_to_torch, runs_kernels
from plora_kernels.dispatch import (
    Gradients,
    _library,
    _rows,
    all_gradients,
    as_autograd_takes,
    call,
    fake_gradients,
    is_recorded,
    refuse_transforms,
    register,
    shaped_as,
)
from plora_kernels.fallback import linear as fallback

_library.define(
    "linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? index, float scale, "
    "bool frozen, bool keep_s, float dropout_p, Tensor? dropout_seed) -> (Tensor y, Tensor s)"
)
_library.define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, Tensor? index, "
    "float scale, bool frozen, bool need_x, bool need_A, bool need_B, bool need_bias, float dropout_p, "
    "Tensor? dropout_seed) -> (Tensor d_x, Tensor d_lora_A, Tensor d_lora_B, Tensor d_bias)"
)


def _places(lora_A: Tensor, index: Tensor | None, frozen: bool) -> int:
    """Return the number of columns of S: every module, or one per entry of the index."""
    return lora_A.shape[0] if frozen or index is None else index.shape[0]


def _run_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return `(y, s)` of rows x (M, K) by the kernels or by torch."""
    if runs_kernels(x):
        with fallback_to_torch("the forward", x):
            from plora_kernels.kernels import linear as kernels

            return kernels.forward(x, *arguments)
    return fallback.forward(x, *arguments)


def _run_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)` of rows dy (M, N) by the kernels or by torch."""
    if runs_kernels(dy):
        with fallback_to_torch("the backward", dy):
            from plora_kernels.kernels import linear as kernels

            d_x, d_lora_A, d_lora_B = kernels.backward(dy, *arguments)
            return d_x, d_lora_A, d_lora_B
    return fallback.backward(dy, *arguments)


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(
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
    y, s = _run_forward(_rows(x), weight, lora_A, lora_B, bias, index, scale, frozen, keep_s, dropout_p, dropout_seed)
    return shaped_as(x, y), s


@torch.library.register_fake("plora::linear", lib=_library)
def _linear_fake(
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
    s = x.new_empty((math.prod(x.shape[:-1]), _places(lora_A, index, frozen)) if keep_s else (0,))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), s


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
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
    need_bias: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Gradients:
    dy_rows, needs = _rows(dy), (need_x, need_A, need_B)
    gradients = _run_backward(
        dy_rows, _rows(x), weight, lora_A, lora_B, s, index, scale, frozen, *needs, dropout_p, dropout_seed
    )
    return all_gradients(gradients, dy_rows, x, need_x, need_bias)


@torch.library.register_fake("plora::linear_backward", lib=_library)
def _linear_backward_fake(
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
    need_bias: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Gradients:
    return fake_gradients(dy, x, lora_A, lora_B, need_x, need_A, need_B, need_bias)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_A, lora_B, _, index, scale, frozen, _, dropout_p, dropout_seed = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, s, index, dropout_seed)
    ctx.scale, ctx.frozen, ctx.dropout_p = scale, frozen, dropout_p


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None, recorded: bool = False) -> tuple[Tensor | None, ...]:
    if dy is None:
        return as_autograd_takes(ctx, None)
    x, weight, lora_A, lora_B, s, index, seed = ctx.saved_tensors
    need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    needs = need_x, need_A, need_B, need_bias
    backward = _BACKWARD if recorded or is_recorded(dy) else _linear_backward
    gradients = backward(dy, x, weight, lora_A, lora_B, s, index, ctx.scale, ctx.frozen, *needs, ctx.dropout_p, seed)
    return as_autograd_takes(ctx, gradients)


register("linear", _save_for_backward, _differentiate)
# Found once: looking an operator up at every call takes as long as checking its arguments.
_FORWARD, _BACKWARD = torch.ops.plora.linear, torch.ops.plora.linear_backward


class _EagerLinear(torch.autograd.Function):
    """`plora::linear` without the operator's dispatch."""

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
    scale: float,
    frozen: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """Return y (…, N) of `plora::linear`, differentiable; S is kept if dB will want it."""
    refuse_transforms(x, weight, lora_A, lora_B, bias)
    keep_s = torch.is_grad_enabled() and lora_B.requires_grad
    arguments = (x, weight, lora_A, lora_B, bias, index, scale, frozen, keep_s, dropout_p, dropout_seed)
    return call(_FORWARD, _EagerLinear, _linear, arguments)
