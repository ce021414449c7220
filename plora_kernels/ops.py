"""`plora::linear` as a torch operator: schemas, fake tensors, autograd, choice of the backend.

It takes tensors that were checked and a selection as an index buffer; `functional` does the checking.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import torch_path
from .backend import falling_back, runs_kernels
from .errors import UnsupportedError

_library = torch.library.Library("plora", "DEF")
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


def _rows(tensor: Tensor) -> Tensor:
    """Return (…, D) as (M, D)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _run_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return `(y, s)` of rows x (M, K) by the kernels or by torch."""
    if runs_kernels(x):
        with falling_back("the forward", x):
            from .kernels import forward

            return forward.forward(x, *arguments)
    return torch_path.forward(x, *arguments)


def _run_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)` of rows dy (M, N) by the kernels or by torch."""
    if runs_kernels(dy):
        with falling_back("the backward", dy):
            from .kernels import backward

            return backward.backward(dy, *arguments)
    return torch_path.backward(dy, *arguments)


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
    # Not a view: autograd lets no one write in place to a view that a custom function returns.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0])), s


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy_rows, x_rows = _rows(dy), _rows(x)
    d_x, d_lora_A, d_lora_B = _run_backward(
        dy_rows,
        x_rows,
        weight,
        lora_A,
        lora_B,
        s,
        index,
        scale,
        frozen,
        need_x,
        need_A,
        need_B,
        dropout_p,
        dropout_seed,
    )
    d_bias = dy_rows.sum(0) if need_bias else dy.new_empty(0)
    return d_x.view(x.shape) if need_x else d_x, d_lora_A, d_lora_B, d_bias


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = (0,)
    return (
        x.new_empty(x.shape if need_x else nothing),
        x.new_empty(lora_A.shape if need_A else nothing),
        x.new_empty(lora_B.shape if need_B else nothing),
        x.new_empty((dy.shape[-1],) if need_bias else nothing),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_A, lora_B, _, index, scale, frozen, _, dropout_p, dropout_seed = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, s, index, dropout_seed)
    ctx.scale, ctx.frozen, ctx.dropout_p = scale, frozen, dropout_p


def _differentiate_linear(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    x, weight, lora_A, lora_B, s, index, seed = ctx.saved_tensors
    need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    # Called with create_graph=True, the operator records itself, so as to refuse a double backward by name.
    backward = torch.ops.plora.linear_backward if _watched(dy) or torch.is_grad_enabled() else _linear_backward
    d_x, d_lora_A, d_lora_B, d_bias = backward(
        dy,
        x,
        weight,
        lora_A,
        lora_B,
        s,
        index,
        ctx.scale,
        ctx.frozen,
        need_x,
        need_A,
        need_B,
        need_bias,
        ctx.dropout_p,
        seed,
    )
    return (
        d_x if need_x else None,
        None,
        d_lora_A if need_A else None,
        d_lora_B if need_B else None,
        d_bias if need_bias else None,
        *(None,) * 6,
    )


def _refuse_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise UnsupportedError("plora_linear has no double backward; call backward without create_graph=True")


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise UnsupportedError("plora_linear does not run under vmap; give x a leading batch axis instead")


torch.library.register_autograd("plora::linear", _differentiate_linear, setup_context=_save_for_backward, lib=_library)
torch.library.register_autograd("plora::linear_backward", _refuse_double_backward, lib=_library)
torch.library.register_vmap("plora::linear", _refuse_vmap, lib=_library)
torch.library.register_vmap("plora::linear_backward", _refuse_vmap, lib=_library)


class _EagerLinear(torch.autograd.Function):
    """`plora::linear` without the operator's dispatch, which costs more host time than a small layer computes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        # Not split into forward and setup_context: torch would inspect the signature anew at every call.
        output = _linear(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate_linear)


def _watched(*tensors: Tensor) -> bool:
    """Say whether somebody watches operators: a compiler, a dispatch mode or a tensor subclass."""
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            return True
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


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
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise UnsupportedError("plora_linear does not run under torch.func transforms (vmap, grad, jvp); use autograd")
    grad = torch.is_grad_enabled()
    keep_s = grad and lora_B.requires_grad
    arguments = (x, weight, lora_A, lora_B, bias, index, scale, frozen, keep_s, dropout_p, dropout_seed)
    if _watched(x, weight, lora_A, lora_B):
        y, _ = torch.ops.plora.linear(*arguments)
    elif grad:
        y, _ = _EagerLinear.apply(*arguments)
    else:
        y, _ = _linear(*arguments)
    return y
