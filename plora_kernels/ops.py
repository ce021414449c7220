"""`plora_linear` and `fold_` as torch operators: argument checks, autocast, autograd, fake tensors, backend choice.

The operators take tensors that were checked and a selection as an index buffer (see `selection`); the public
functions do the checking and the conversion. Nothing here reads a device tensor on the host.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import torch_path
from .backend import runs_kernels
from .errors import (
    ConfigError,
    DeviceError,
    DTypeError,
    SelectionError,
    ShapeError,
    StateError,
    UnsupportedError,
)
from .selection import (
    Selection,
    check_mask,
    check_rank,
    complement,
    host_indices,
    index_buffer,
    index_from_mask,
    mask_from_indices,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNSELECTED = ("folded", "frozen")


# ---------------------------------------------------------------------------------------------------- operators

_library = torch.library.Library("plora", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? index, float scale, "
    "bool frozen, bool keep_s) -> (Tensor y, Tensor s)"
)
_library.define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, Tensor? index, "
    "float scale, bool frozen, bool need_x, bool need_A, bool need_B, bool need_bias) "
    "-> (Tensor d_x, Tensor d_lora_A, Tensor d_lora_B, Tensor d_bias)"
)


def _places(lora_A: Tensor, index: Tensor | None, frozen: bool) -> int:
    """Return the number of columns of S: every module, or one per entry of the index."""
    return lora_A.shape[0] if frozen or index is None else index.shape[0]


def _forward_module(tensor: Tensor) -> ModuleType:
    if runs_kernels(tensor):
        from .kernels import forward

        return forward
    return torch_path


def _backward_module(tensor: Tensor) -> ModuleType:
    if runs_kernels(tensor):
        from .kernels import backward

        return backward
    return torch_path


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
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    applied = None if frozen else index  # frozen modules all enter y
    y, s = _forward_module(x).forward(rows, weight, lora_A, lora_B, bias, applied, scale, keep_s)
    return y.view(*x.shape[:-1], weight.shape[0]), s


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
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if x.dim() != 2 else x.shape[0]
    s = x.new_empty((rows, _places(lora_A, index, frozen)) if keep_s else (0,))
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    d_x, d_lora_A, d_lora_B = _backward_module(x).backward(
        dy_rows, x_rows, weight, lora_A, lora_B, s, index, scale, frozen, need_x, need_A, need_B
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = (0,)
    return (
        x.new_empty(x.shape if need_x else nothing),
        x.new_empty(lora_A.shape if need_A else nothing),
        x.new_empty(lora_B.shape if need_B else nothing),
        x.new_empty((dy.shape[-1],) if need_bias else nothing),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_A, lora_B, _, index, scale, frozen, _ = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, s, index)
    ctx.scale, ctx.frozen = scale, frozen


def _differentiate_linear(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, weight, lora_A, lora_B, s, index = ctx.saved_tensors
    need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    d_x, d_lora_A, d_lora_B, d_bias = torch.ops.plora.linear_backward(
        dy, x, weight, lora_A, lora_B, s, index, ctx.scale, ctx.frozen, need_x, need_A, need_B, need_bias
    )
    return (
        d_x if need_x else None,
        None,
        d_lora_A if need_A else None,
        d_lora_B if need_B else None,
        d_bias if need_bias else None,
        None,
        None,
        None,
        None,
    )


def _refuse_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise UnsupportedError("plora_linear has no double backward; call backward without create_graph=True")


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise UnsupportedError("plora_linear does not run under vmap; give x a leading batch axis instead")


torch.library.register_autograd("plora::linear", _differentiate_linear, setup_context=_save_for_backward, lib=_library)
torch.library.register_autograd("plora::linear_backward", _refuse_double_backward, lib=_library)
torch.library.register_vmap("plora::linear", _refuse_vmap, lib=_library)
torch.library.register_vmap("plora::linear_backward", _refuse_vmap, lib=_library)


@torch.library.custom_op("plora::fold_", mutates_args=("weight",))
def _fold_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float) -> None:
    if runs_kernels(weight):
        from .kernels import fold

        fold.fold_(weight, lora_A, lora_B, index, scale)
    else:
        torch_path.fold_(weight, lora_A, lora_B, index, scale)


@_fold_.register_fake
def _fold_fake(weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float) -> None:
    return None


# ------------------------------------------------------------------------------------------------------- checks


def _check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise ShapeError or RankError unless weight (N, K), lora_A (R, K), lora_B (N, R) fit together."""
    if weight.dim() != 2:
        raise ShapeError(f"weight is {tuple(weight.shape)}; a matrix (N, K) is needed")
    n, k = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != k:
        raise ShapeError(f"lora_A is {tuple(lora_A.shape)}; weight (N={n}, K={k}) needs (R, {k})")
    rank = check_rank(int(lora_A.shape[0]))
    if tuple(lora_B.shape) != (n, rank):
        raise ShapeError(
            f"lora_B is {tuple(lora_B.shape)}; weight (N={n}, K={k}) and lora_A of rank {rank} need ({n}, {rank})"
        )


def _check_alike(first: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise DTypeError or DeviceError unless every tensor has the dtype and device of the one named `first`."""
    leader = tensors[first]
    assert leader is not None
    if leader.dtype not in DTYPES:
        raise DTypeError(f"{first} is {leader.dtype}; float16, bfloat16, float32 or float64 is needed")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != leader.device:
            raise DeviceError(f"{name} is on {tensor.device}, {first} on {leader.device}; put them on one device")
        if tensor.dtype != leader.dtype:
            raise DTypeError(f"{name} is {tensor.dtype}, {first} is {leader.dtype}; cast one or use torch.autocast")


def _index_for(selected: Selection | None, rank: int, device: torch.device, *, invert: bool = False) -> Tensor | None:
    """Return a selection (or its complement) as an index buffer on `device`; None for every module.

    Host sequences and host tensors are validated on the host. A tensor on the operator's own device that is not the
    host, and any tensor inside torch.compile, is turned into the buffer there, at width R: it is never read.
    """
    if selected is None:
        return None
    if isinstance(selected, Tensor) and (selected.device.type != "cpu" or torch.compiler.is_compiling()):
        if selected.device != device:
            raise DeviceError(f"selected is on {selected.device}, the tensors on {device}; use that device or the host")
        if selected.dtype is torch.bool:
            check_mask(selected, rank)
            mask = selected
        elif selected.is_floating_point() or selected.is_complex():
            raise SelectionError(f"selected is {selected.dtype}; integers are indices, a bool tensor is a mask")
        else:
            mask = mask_from_indices(selected, rank)
        return index_from_mask(~mask if invert else mask)
    indices = host_indices(selected, rank)
    return index_buffer(complement(indices, rank) if invert else indices, device)


def check_unselected(unselected: str) -> str:
    """Return `unselected` if it names a form; raise ConfigError otherwise."""
    if unselected not in UNSELECTED:
        raise ConfigError(f"unselected is {unselected!r}; it may be 'folded' or 'frozen'")
    return unselected


def _autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as autocast does for `nn.Linear`: to the active dtype of x's device, float64 left as it is."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, *tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t
        for t in (x, *tensors)
    )


# -------------------------------------------------------------------------------------------- public functions


def plora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    selected: Selection | None = None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    unselected: str = "folded",
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Return `y: (…, N)` = x Wᵀ + bias + s·((x Aᵀ) ⊙ m) Bᵀ, differentiable in x, lora_A, lora_B and bias.

    Args:
        x: (…, K), any leading shape, contiguous or not, possibly empty.
        weight: (N, K), the frozen base. With `unselected="folded"` it holds the unselected modules already (`fold_`).
        lora_A: (R, K) down-projection; lora_B: (N, R) up-projection; 1 ≤ R ≤ 256.
        selected: which modules the caller trains. A bool tensor (R,) is a mask, integers are indices, `[]` selects
            none, None all. Host values are validated; a tensor on another device is never read by the host.
        bias: (N,) or None.
        scale: s, one number for all modules.
        unselected: "folded": unselected modules do not enter y (they sit in the weight). "frozen": they enter y and
            dx, and get no gradient.
        dropout_p, dropout_seed, groups: reserved; only their defaults are supported.

    All tensors share one dtype (float16, bfloat16, float32, float64) and one device; under torch.autocast they are
    cast as for `nn.Linear`. Kernels accumulate in fp32 and round once. Gradients of unselected modules are zero.

    Raises:
        ShapeError, RankError, DTypeError, DeviceError, SelectionError, ConfigError: an argument does not fit.
        StateError: weight requires a gradient; the base is frozen.
        UnsupportedError: a reserved argument; double backward; vmap.

    Source: arXiv 2602.16936.
    """
    if dropout_p != 0.0 or dropout_seed is not None:
        raise UnsupportedError(f"dropout_p is {dropout_p} and dropout_seed {dropout_seed}; only 0.0 and None work yet")
    if groups is not None:
        raise UnsupportedError("groups is set; one adapter a call works, several groups in a call do not yet")
    check_unselected(unselected)
    _check_factors(weight, lora_A, lora_B)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ShapeError(f"x is {tuple(x.shape)}; weight (N={n}, K={k}) needs (…, {k})")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ShapeError(f"bias is {tuple(bias.shape)}; weight (N={n}, K={k}) needs ({n},)")
    if weight.requires_grad and torch.is_grad_enabled():
        raise StateError("weight requires a gradient, but the base is frozen: call weight.requires_grad_(False)")
    index = _index_for(selected, lora_A.shape[0], x.device)
    return linear_with_index(x, weight, lora_A, lora_B, bias, index, float(scale), unselected == "frozen")


def linear_with_index(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    scale: float,
    frozen: bool,
) -> Tensor:
    """Apply autocast, check dtypes and devices and run the operator on an index buffer (None: all modules)."""
    x_, weight_, A_, B_, bias_ = _autocast(x, weight, lora_A, lora_B, bias)
    _check_alike("x", {"x": x_, "weight": weight_, "lora_A": A_, "lora_B": B_, "bias": bias_})
    keep_s = torch.is_grad_enabled() and lora_B.requires_grad
    y, _ = torch.ops.plora.linear(x_, weight_, A_, B_, bias_, index, scale, frozen, keep_s)
    return y


def fold_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    selected: Selection | None,
    *,
    scale: float = 1.0,
    sign: int = 1,
) -> Tensor:
    """Add the unselected modules to the weight in place, W += sign·s·Σ_{j∉selected} b_j a_jᵀ, and return it.

    Args:
        weight: (N, K), changed in place; lora_A (R, K), lora_B (N, R) of the same dtype and device.
        selected: the modules to leave out: a bool mask (R,), indices, `[]` to fold all, None (all selected) to fold
            none.
        scale: s. sign: +1 folds, −1 takes out again (to rounding: keep the original where it must be exact).

    The sum runs in fp32 (float64 for float64) and is rounded once into the weight. It has no autograd: the factors
    enter as constants.

    Raises:
        ShapeError, RankError, DTypeError, DeviceError, SelectionError: an argument does not fit.
        ConfigError: sign is neither 1 nor −1.
        StateError: weight requires a gradient and gradients are enabled.

    Source: Select-N-Fold, arXiv 2602.16936.
    """
    if sign not in (1, -1):
        raise ConfigError(f"sign is {sign!r}; 1 folds and -1 takes out again")
    _check_factors(weight, lora_A, lora_B)
    _check_alike("weight", {"weight": weight, "lora_A": lora_A, "lora_B": lora_B})
    if weight.requires_grad and torch.is_grad_enabled():
        raise StateError("weight requires a gradient: fold inside torch.no_grad() or call weight.requires_grad_(False)")
    if selected is None:
        return weight
    index = _index_for(selected, lora_A.shape[0], weight.device, invert=True)
    torch.ops.plora.fold_(weight.detach(), lora_A.detach(), lora_B.detach(), index, float(scale) * sign)
    return weight
