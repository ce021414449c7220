"""The product of a layer with a quantised weight: y = x Wᵀ + bias + s·((D(x) Aᵀ) ⊙ m) Bᵀ, and its gradients.

The weight is dequantised once a call into the dtype of the products, and the operators for dense weights go on from
there. The copy is dropped when the call returns: the backward dequantises again, if x needs a gradient, so that no
dense weight waits for it. For a few rows the library's own product is taken, which reads the packed weight, and one
launch adds the side branch to it in place.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from plora_kernels.checks import check_operands
from plora_kernels.counter_rng import keep_mask
from plora_kernels.dispatch import as_rows, autocast_dtype, final, refuse_transforms, without_autocast
from plora_kernels.errors import ShapeError
from plora_kernels.nn.quantized.kind import QuantizedKind
from plora_kernels.ops.side_branch import add_side_branch_

# Up to so many rows the library's product is taken. Per weight of 4 bits, dequantising reads 0.5 bytes and writes 2,
# which the product reads again: 4.5 bytes against the 0.5 of a kernel that reads the packed weight once. Such kernels
# read it once for one tile of a matrix unit, 16 rows; with more they soon lose to a dense product.
FEW_ROWS = 16


class Call(NamedTuple):
    """One call's arguments besides tensors with a gradient, in the order of the operators' schemas.

    `operator` is "linear" or "grouped_linear"; all modules enter y (the frozen form). `modules` are the tensors that
    select modules, the index first; `dropout` are dropout's seeds and, for groups, row numbers.
    """

    operator: str
    module: nn.Linear
    kind: QuantizedKind
    modules: tuple[Tensor | None, ...]
    scale: float
    dropout_p: float
    dropout: tuple[Tensor | None, ...]


def multiply(call: Call, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return y (…, N) for x (…, K) and the factors of one layer, or of groups; differentiable in x, lora_A, lora_B
    and the module's bias, should that require a gradient.

    Where a 4-bit layer's compute_dtype is narrower than x, the base runs in that and the side branch in x's dtype, as
    in PEFT; for groups, inside torch.compile and under autocast all runs in the narrower one.

    Raises:
        ShapeError, DTypeError, DeviceError: x does not fit the weight, or the factors do not fit x.
        UnsupportedError: double backward; torch.func transforms; a forward-mode tangent.
    """
    module = call.module
    if x.dim() == 0 or x.shape[-1] != module.in_features:
        shape = f"(N={module.out_features}, K={module.in_features})"
        raise ShapeError(f"x is {tuple(x.shape)}; weight {shape} needs (…, {module.in_features})")
    refuse_transforms(x, lora_A, lora_B)
    autocast = autocast_dtype(x.device.type)
    dtype, result = call.kind.dtypes(module, x, autocast)
    compiling = torch.compiler.is_compiling()
    apart = x.dtype.itemsize > dtype.itemsize and call.operator == "linear" and autocast is None and not compiling
    rows = x if apart else x.to(dtype)
    bias: Tensor | None = module.bias
    bias = None if bias is None else bias.to(dtype)
    check_operands("x", {"x": rows, "bias": None if apart else bias}, lora_A, lora_B)
    with without_autocast(x.device.type):
        if compiling:
            keep_s = torch.is_grad_enabled() and lora_B.requires_grad
            y = _dense(call, _dequantized(call, dtype), rows, lora_A, lora_B, bias, keep_s)[0]
        else:
            y = _Product.apply(call, dtype, torch.is_grad_enabled(), rows, lora_A, lora_B, bias)
    return y.to(result)


def _dequantized(call: Call, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return call.kind.dequantize(call.module, dtype)


def _dense(
    call: Call, weight: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, keep_s: bool
) -> tuple[Tensor, Tensor]:
    """Return y and S of the operator for dense weights."""
    operator = getattr(torch.ops.plora, call.operator)
    y, s = operator(
        x, weight, lora_A, lora_B, bias, *call.modules, call.scale, True, keep_s, call.dropout_p, *call.dropout
    )
    return y, s


def _base_of_few(call: Call, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return x Wᵀ + bias by the library's product; None for many rows, for groups, and where it has none."""
    few = call.operator == "linear" and 0 < math.prod(x.shape[:-1]) <= FEW_ROWS
    return call.kind.product(call.module, x, bias) if few else None


class _Product(torch.autograd.Function):
    """The product as one node of the graph, which holds the quantised module and no dense weight.

    `dtype` is that of the base's product. Where x is wider, the side branch is added to it in x's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, dtype: torch.dtype, recorded: bool, x: Tensor, lora_A: Tensor, lora_B: Tensor,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        keep_s = recorded and lora_B.requires_grad
        y = _base_of_few(call, x.to(dtype), bias)
        if y is None and x.dtype is dtype:
            y, s = _dense(call, _dequantized(call, dtype), x, lora_A, lora_B, bias, keep_s)
        else:
            y = functional.linear(x.to(dtype), _dequantized(call, dtype), bias) if y is None else y
            y = y.to(x.dtype)
            s = add_side_branch_(
                as_rows(y), as_rows(x), lora_A, lora_B, call.modules[0], call.scale, True, keep_s, call.dropout_p,
                call.dropout[0],
            )  # fmt: skip
        ctx.call, ctx.dtype = call, dtype
        ctx.save_for_backward(x, lora_A, lora_B, s)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x, lora_A, lora_B, s = ctx.saved_tensors
        need_x, *others = ctx.needs_input_grad[3:7]
        whole = x.dtype is ctx.dtype  # the operator computes dX too
        if need_x and whole:
            weight = _dequantized(call, x.dtype)
        else:  # the operator does not read it
            weight = x.new_zeros(()).expand(call.module.out_features, call.module.in_features)
        backward = getattr(torch.ops.plora, f"{call.operator}_backward")
        needs = need_x and whole, *others
        with without_autocast(x.device.type):
            gradients = backward(
                dy, x, weight, lora_A, lora_B, s, *call.modules, call.scale, True, *needs, call.dropout_p,
                *call.dropout,
            )  # fmt: skip
            d_x, d_A, d_B, d_bias = (one if need else None for one, need in zip(gradients, needs, strict=True))
            if need_x and not whole:
                with torch.no_grad():
                    base = as_rows(dy).to(ctx.dtype) @ _dequantized(call, ctx.dtype)
                    d_x = _add_side_gradient(call, base.to(x.dtype), as_rows(dy), lora_A, lora_B).view(x.shape)
                if torch.is_grad_enabled():  # under create_graph=True; the operator's own gradients raise by themselves
                    (d_x,) = final((d_x,), dy, lora_A, lora_B)
        return None, None, None, d_x, d_A, d_B, d_bias


def _add_side_gradient(call: Call, d_x: Tensor, dy: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Add s·D'((dY B) ⊙ m) A to d_x (M, K) in place, D' for the selected modules only; return it.

    It is the side branch with the factors' roles exchanged, but that dropout masks its result.
    """
    down, up, index, seed, p = lora_B.t(), lora_A.t(), call.modules[0], call.dropout[0], call.dropout_p
    add_side_branch_(d_x, dy, down, up, None, call.scale, True, False, 0.0, None)
    if seed is not None and p > 0.0:
        chosen = torch.zeros_like(d_x)
        add_side_branch_(chosen, dy, down, up, index, call.scale, False, False, 0.0, None)
        kept = keep_mask(seed, d_x.shape[0], d_x.shape[1], p)
        d_x.add_(torch.where(kept, chosen / (1 - p), 0.0) - chosen)
    return d_x
