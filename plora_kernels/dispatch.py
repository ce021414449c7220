"""What the package's differentiable operators share: their library, how they are called, what they refuse.

Each is an operator `plora::name` with outputs (y, s) and `plora::name_backward`, registered with autograd, and a
`torch.autograd.Function` around the same two functions for calls that nobody watches: an operator's dispatch costs
more host time than a small layer computes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from plora_kernels.errors import UnsupportedError

_library = torch.library.Library("plora", "DEF")

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, lora_A, lora_B and bias


def _watched(*tensors: Tensor) -> bool:
    """Say whether a call must go through torch's dispatcher.

    So it must where somebody watches operators, a compiler, a dispatch mode or a tensor subclass, and for a tensor that
    stands for its negative (`x.conj().imag`), which the dispatcher resolves.
    """
    if torch.compiler.is_compiling():  # first: a compiler cannot trace what is asked next
        return True
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or tensor.is_neg():
            return True
    return is_in_torch_dispatch_mode()


def _rows(tensor: Tensor) -> Tensor:
    """Return (…, D) as (M, D)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def shaped_as(x: Tensor, y: Tensor) -> Tensor:
    """Return y (M, N) as (…, N) for x (…, K)."""
    # Not a view: autograd lets no one write in place to a view that a custom function returns.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def all_gradients(
    gradients: tuple[Tensor, Tensor, Tensor], dy_rows: Tensor, x: Tensor, need_x: bool, need_bias: bool
) -> Gradients:
    """Return dx, dA, dB and dbias, given the first three of rows; what is not needed has no elements."""
    d_x, d_lora_A, d_lora_B = gradients
    d_bias = dy_rows.sum(0) if need_bias else dy_rows.new_empty(0)
    return d_x.view(x.shape) if need_x and x.dim() != 2 else d_x, d_lora_A, d_lora_B, d_bias


def fake_gradients(
    dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, need_x: bool, need_A: bool, need_B: bool, need_bias: bool
) -> Gradients:
    """Return tensors of the gradients' shapes."""
    nothing = (0,)
    return (
        x.new_empty(x.shape if need_x else nothing),
        x.new_empty(lora_A.shape if need_A else nothing),
        x.new_empty(lora_B.shape if need_B else nothing),
        x.new_empty((dy.shape[-1],) if need_bias else nothing),
    )


def as_autograd_takes(ctx: Any, gradients: Gradients | None) -> tuple[Tensor | None, ...]:
    """Return a gradient for each input: x, weight, lora_A, lora_B, bias and what has none."""
    needs = ctx.needs_input_grad
    if gradients is None:
        return (None,) * len(needs)
    d_x, d_lora_A, d_lora_B, d_bias = gradients
    wanted = zip((d_x, None, d_lora_A, d_lora_B, d_bias), needs, strict=False)
    return *(gradient if need else None for gradient, need in wanted), *(None,) * (len(needs) - 5)


def is_recorded(dy: Tensor) -> bool:
    """Say whether a backward goes through its operator.

    It refuses create_graph=True, and takes a batch of gradients (is_grads_batched=True) apart.
    """
    return _watched(dy) or torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy)


def register(name: str, save: Callable[..., None], differentiate: Callable[..., Any]) -> None:
    """Register `plora::name` with autograd; refuse a double backward and vmap by name.

    Whoever had reason to watch the forward, or tensors only the dispatcher reads right, has it in the backward too:
    `differentiate` is told to take the operator.
    """
    backward = f"{name}_backward"
    by_operator = functools.partial(differentiate, recorded=True)
    torch.library.register_autograd(f"plora::{name}", by_operator, setup_context=save, lib=_library)
    torch.library.register_autograd(f"plora::{backward}", _refuse_double_backward, lib=_library)
    for operator in (name, backward):
        torch.library.register_vmap(f"plora::{operator}", _refuse_vmap, lib=_library)


def _refuse_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise UnsupportedError("plora_linear has no double backward; call backward without create_graph=True")


class _Final(torch.autograd.Function):
    """Hands on gradients, told what they were computed from, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor | None, ...], *computed_from: Tensor) -> tuple[Tensor | None, ...]:
        return gradients

    backward = staticmethod(_refuse_double_backward)


def no_double_backward(backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Let a Function's `backward` run without a graph, and refuse to differentiate what it returns."""

    @functools.wraps(backward)
    def run(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy):
            raise UnsupportedError(
                "groups take no batch of gradients (is_grads_batched=True); go through them one by one"
            )
        if not torch.is_grad_enabled():  # as it is but under create_graph=True
            return backward(ctx, dy)
        with torch.no_grad():
            gradients = backward(ctx, dy)
        final: tuple[Tensor | None, ...] = _Final.apply(gradients, dy, *ctx.saved_tensors)
        return final

    return run


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise UnsupportedError("plora_linear does not run under vmap; give x a leading batch axis instead")


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise UnsupportedError inside torch.func's transforms, and for tensors with a forward-mode tangent."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError("plora_linear does not run under torch.func transforms (vmap, grad, jvp); use autograd")
    # Asked first, as it costs nothing: outside dual_level no tensor has one.
    given = (t for t in tensors if t is not None)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise UnsupportedError("plora_linear has no forward-mode derivative; use autograd's backward")


def call(
    operator: Any, eager: type[torch.autograd.Function], run: Callable[..., Any], arguments: tuple[Any, ...]
) -> Tensor:
    """Return y of an operator's (y, s), on the shortest way there is: `operator` where somebody watches, else `eager`.

    The first five arguments are x, weight, lora_A, lora_B, and bias or None.
    """
    if _watched(*arguments[: 4 if arguments[4] is None else 5]):
        y, _ = operator(*arguments)
    elif torch.is_grad_enabled():
        y, _ = eager.apply(*arguments)
    else:
        y, _ = run(*arguments)
    return y
