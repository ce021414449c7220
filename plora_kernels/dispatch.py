"""What the package's differentiable operators share: their torch library, how they are called, what they refuse.

Each operator exists twice. `plora::name`, with outputs (y, s), and `plora::name_backward` are registered with torch's
dispatcher and with autograd. A `torch.autograd.Function` wraps the same two functions for plain eager calls, because
dispatching a custom operator takes more host time than a small layer takes to compute. `define` makes both forms from
a forward and a backward that work on rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from plora_kernels.errors import UnsupportedError

_library = torch.library.Library("plora", "DEF")

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, lora_A, lora_B and bias
_OPERANDS = "Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B"


# Device types without autocast: torch.is_autocast_enabled raises an error for them. The set is computed at import,
# without touching a device, because torch.compile of torch 2.11 cannot trace is_autocast_available. A device type that
# is not listed comes from a backend outside torch, possibly renamed later, and is taken to have autocast.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "ipu", "xla", "lazy", "vulkan", "meta")
_WITHOUT_AUTOCAST = frozenset(kind for kind in _KINDS if not torch.amp.is_autocast_available(kind))


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype that autocast casts to on a device type, or None if it is off or does not exist there."""
    if kind in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """Return a context in which products keep their dtypes, for a device type, which may have no autocast.

    A forward has cast its operands. A backward that the caller runs inside autocast uses the forward's dtypes.
    """
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


def is_watched(*tensors: Tensor) -> bool:
    """Say whether a call must go through torch's dispatcher.

    It must if a compiler, torch.jit.trace, a dispatch mode or a tensor subclass intercepts operators, or if a tensor
    has its negative bit set (`x.conj().imag`): its memory holds the negated values, and the dispatcher negates them.
    """
    if torch.compiler.is_compiling():  # checked first: torch.compile cannot trace the checks below
        return True
    if torch.jit.is_tracing():
        return True
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or tensor.is_neg():
            return True
    return is_in_torch_dispatch_mode()


def keeps_s(lora_B: Tensor) -> bool:
    """Say whether a forward keeps S = D(x) Aᵀ for dB; under torch.jit.trace always, where the flag is a constant."""
    return torch.jit.is_tracing() or (torch.is_grad_enabled() and lora_B.requires_grad)


def as_rows(tensor: Tensor) -> Tensor:
    """Return (…, D) as (M, D)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def shaped_as(x: Tensor, y: Tensor) -> Tensor:
    """Return y (M, N) as (…, N) for x (…, K)."""
    # `_unsafe_view` returns a tensor that is not marked as a view. A caller may then write to y in place, which
    # autograd forbids for a view returned by a custom function.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def is_recorded(dy: Tensor) -> bool:
    """Say whether a backward must go through its operator, given its output gradient.

    The operator raises an error under create_graph=True, and torch runs it once per gradient for a batch of gradients
    (is_grads_batched=True).
    """
    return is_watched(dy) or torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy)


def define(
    name: str,
    modules: str,
    dropout: str,
    run_forward: Callable[..., tuple[Tensor, Tensor]],
    run_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    places: Callable[[Tensor, Tensor | None, bool], int],
    bias_gradient: Callable[..., Tensor] | None = None,
) -> Callable[..., Tensor]:
    """Define `plora::name` and `plora::name_backward`, with fakes and autograd, and return a function that calls them.

    The forward's arguments are x (…, K), weight, lora_A, lora_B, bias, those of `modules`, scale, frozen, keep_s,
    dropout_p and those of `dropout`; the function that is returned takes the same.

    Args:
        modules: the schema of the arguments that select the modules, the index buffer first.
        dropout: the schema of dropout's seeds and row numbers.
        run_forward: returns y (M, N) and S of rows x (M, K), given all the arguments.
        run_backward: returns dx, dA and dB of rows dy (M, N), given dy, x, weight, lora_A, lora_B, s, `modules`, scale,
            frozen, the flags need_x, need_A and need_B, dropout_p and `dropout`. dx has x's dtype; dA and dB have the
            factors' dtype, which may be fp32 beside half precision.
        places: returns the number of columns of S for lora_A, the index and frozen.
        bias_gradient: returns d_bias (N,), or (C, N) if the weight is (C, N, K), given dy_rows (M, N), weight and
            `modules`; None adds up the rows.
    """
    scale_at = 5 + modules.count(",") + 1  # among the forward's arguments
    _library.define(
        f"{name}({_OPERANDS}, Tensor? bias, {modules}, float scale, bool frozen, bool keep_s, float dropout_p, "
        f"{dropout}) -> (Tensor y, Tensor s)"
    )
    _library.define(
        f"{name}_backward(Tensor dy, {_OPERANDS}, Tensor s, {modules}, float scale, bool frozen, bool need_x, "
        f"bool need_A, bool need_B, bool need_bias, float dropout_p, {dropout}) "
        "-> (Tensor d_x, Tensor d_lora_A, Tensor d_lora_B, Tensor d_bias)"
    )

    def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, s = run_forward(as_rows(x), *arguments)
        return shaped_as(x, y), s

    def fake_forward(x: Tensor, weight: Tensor, lora_A: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        index, frozen, keep_s = arguments[2], *arguments[scale_at - 2 : scale_at]
        s = x.new_empty((math.prod(x.shape[:-1]), places(lora_A, index, frozen)) if keep_s else (0,))
        return x.new_empty((*x.shape[:-1], weight.shape[-2])), s

    def backward(dy: Tensor, x: Tensor, *arguments: Any) -> Gradients:
        *before, need_bias = arguments[: scale_at + 5]  # from weight to need_bias
        dy_rows, need_x = as_rows(dy), before[-3]
        with without_autocast(dy.device.type):
            d_x, d_lora_A, d_lora_B = run_backward(dy_rows, as_rows(x), *before, *arguments[scale_at + 5 :])
        if not need_bias:
            d_bias = dy_rows.new_empty(0)
        elif bias_gradient is None:
            d_bias = dy_rows.sum(0)
        else:  # before `modules` come weight, lora_A, lora_B and s, after them scale, frozen and the flags
            d_bias = bias_gradient(dy_rows, before[0], *before[4:-5])
        return d_x.view(x.shape) if need_x and x.dim() != 2 else d_x, d_lora_A, d_lora_B, d_bias

    def fake_backward(dy: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *rest: Any) -> Gradients:
        need_x, need_A, need_B, need_bias = rest[scale_at - 2 : scale_at + 2]
        nothing = (0,)
        return (
            x.new_empty(x.shape if need_x else nothing),
            lora_A.new_empty(lora_A.shape) if need_A else x.new_empty(nothing),
            lora_B.new_empty(lora_B.shape) if need_B else x.new_empty(nothing),
            x.new_empty((*weight.shape[:-2], dy.shape[-1]) if need_bias else nothing),
        )

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, s = output
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], s, *inputs[5:scale_at], *inputs[scale_at + 4 :])
        ctx.scale, ctx.frozen, _, ctx.dropout_p = inputs[scale_at : scale_at + 4]

    def differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None, recorded: bool = False) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(needs)
        saved, wanted = ctx.saved_tensors, (needs[0], *needs[2:5])  # the weight is frozen
        compute = by_operator if recorded or is_recorded(dy) else backward
        # Saved are the forward's arguments before the scale, with S in place of the bias, then those of dropout.
        gradients = compute(
            dy, *saved[:scale_at], ctx.scale, ctx.frozen, *wanted, ctx.dropout_p, *saved[scale_at:]
        )  # fmt: skip
        d_x, *others = (gradient if need else None for gradient, need in zip(gradients, wanted, strict=True))
        return d_x, None, *others, *(None,) * (len(needs) - 5)

    class Eager(torch.autograd.Function):
        """The operator without its dispatch."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            # One method, no setup_context: with that torch would inspect the signature at every call.
            output = forward(*inputs)
            save_for_backward(ctx, inputs, output)
            return output

        backward = staticmethod(differentiate)

    for operator, run, fake in ((name, forward, fake_forward), (f"{name}_backward", backward, fake_backward)):
        torch.library.impl(_library, operator, "CompositeExplicitAutograd")(run)
        torch.library.register_fake(f"plora::{operator}", fake, lib=_library)
        torch.library.register_vmap(f"plora::{operator}", _refuse_vmap, lib=_library)
    # A forward that went through the dispatcher needs it in the backward too: for the same compiler, mode or subclass.
    recorded = functools.partial(differentiate, recorded=True)
    torch.library.register_autograd(f"plora::{name}", recorded, setup_context=save_for_backward, lib=_library)
    torch.library.register_autograd(f"plora::{name}_backward", _refuse_double_backward, lib=_library)
    # Looked up once, because looking up an operator takes as long as checking its arguments.
    operator, by_operator = (getattr(torch.ops.plora, found) for found in (name, f"{name}_backward"))

    def call(*arguments: Any) -> Tensor:
        """Return y: through the operator if `is_watched`, else without its dispatch, which costs less host time."""
        if is_watched(*arguments[: 4 if arguments[4] is None else 5]):
            y, _ = operator(*arguments)
        elif torch.is_grad_enabled():
            y, _ = Eager.apply(*arguments)
        else:
            y, _ = forward(*arguments)
        result: Tensor = y
        return result

    return call


def _refuse_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise UnsupportedError("plora_linear has no double backward; call backward without create_graph=True")


class _Final(torch.autograd.Function):
    """Identity on gradients that links them to the tensors they were computed from; its own backward raises."""

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor | None, ...], *computed_from: Tensor) -> tuple[Tensor | None, ...]:
        return gradients

    backward = staticmethod(_refuse_double_backward)


def no_double_backward(backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Wrap a Function's `backward`: it runs without a graph, and differentiating the gradients it returns raises."""

    @functools.wraps(backward)
    def run(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy):
            raise UnsupportedError(
                "groups take no batch of gradients (is_grads_batched=True); go through them one by one"
            )
        if not torch.is_grad_enabled():  # autograd enables gradients in a backward only under create_graph=True
            with without_autocast(dy.device.type):
                return backward(ctx, dy)
        with torch.no_grad(), without_autocast(dy.device.type):
            gradients = backward(ctx, dy)
        return final(gradients, dy, *ctx.saved_tensors)

    return run


def final(gradients: tuple[Tensor | None, ...], *computed_from: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients whose own differentiation raises UnsupportedError, given what they were computed from."""
    linked: tuple[Tensor | None, ...] = _Final.apply(gradients, *computed_from)
    return linked


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise UnsupportedError("plora_linear does not run under vmap; give x a leading batch axis instead")


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise UnsupportedError inside torch.func's transforms, and for tensors with a forward-mode tangent."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError("plora_linear does not run under torch.func transforms (vmap, grad, jvp); use autograd")
    # The level is checked first because that is cheap: outside of dual_level no tensor has a tangent.
    given = (t for t in tensors if t is not None)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise UnsupportedError("plora_linear has no forward-mode derivative; use autograd's backward")
