"""The linear operator in plain torch: it runs on CPU, and on other devices where the Triton kernels do not run.

One of the base matmul and the rank-R product adds to the result of the other (`addmm_`), so that no second (M, N)
tensor is made. In fp32 and float64 the rank-R product comes first; in half precision, which rounds between the two,
the base matmul does. The modules that enter y are gathered, and the side product S = D(x) Aᵀ is kept for the backward.
Factors of fp32 beside half precision are rounded once a call, and their gradients are summed and returned in fp32
(`sum_parts_`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from plora_kernels.counter_rng import keep_mask

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by the bytes of a floating-point number
CAST_ELEMENTS = 1 << 19  # of x or dY that are cast to fp32 at a time for a gradient: 2 MiB


def gather(lora_A: Tensor, lora_B: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the indexed modules as A (W, K) and B (N, W), with zeros where the index is −1."""
    if index is None:
        return lora_A, lora_B
    modules, absent = index.clamp_min(0), index < 0
    return (
        lora_A.index_select(0, modules).masked_fill_(absent[:, None], 0.0),
        lora_B.index_select(1, modules).masked_fill_(absent, 0.0),
    )


def entering(lora_A: Tensor, lora_B: Tensor, index: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the indexed modules as `gather` does, rounded to the dtype of the products that they enter."""
    A, B = gather(lora_A, lora_B, index)
    return (A, B) if A.dtype is dtype else (A.to(dtype), B.to(dtype))


def _side_product(rows: Tensor, down: Tensor, index: Tensor | None) -> Tensor:
    """Return rows · down (M, W or R): the side product S or dS.

    Columns without a module are set to zero, because their product is NaN for a row that holds infinity.
    """
    side = rows @ down
    return side if index is None else side.masked_fill_(index < 0, 0.0)


def _dropped(x: Tensor, index: Tensor | None, frozen: bool, p: float, seed: Tensor | None) -> Tensor:
    """Return D(x)·(1−p): x (M, K) with 0 where an element is dropped; x itself without dropout."""
    if seed is None or p == 0.0 or (index is not None and index.shape[0] == 0):
        return x
    return where_kept(x, keep_mask(seed, x.shape[0], x.shape[1], p))


def where_kept(values: Tensor, kept: Tensor) -> Tensor:
    """Return values where the bool mask of their shape says so, and 0 elsewhere, whatever stands there.

    On CPU a number's bits times 1 or 0 take a tenth of the time of `torch.where`.
    """
    words = _WORDS[values.dtype.itemsize]
    return kept.to(words).mul_(values.view(words)).view(values.dtype)


def _is_chosen(index: Tensor, rank: int) -> Tensor:
    """Return which of the R modules an index names, (R,) bool, without reading it on the host."""
    return (index[:, None] == torch.arange(rank, dtype=index.dtype, device=index.device)).any(0)


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return s · left · right. The product applies the scale: no extra pass, and no overflow before scaling."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


def factor_gradient(thin: Tensor, wide: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return s·thinᵀ wide (R, D) in `dtype` for thin (M, R) and wide (M, D): fp32 of half precision by `sum_parts_`."""
    if wide.dtype is dtype:
        return scaled_product(thin.t(), wide, scale)
    total = wide.new_empty(thin.shape[1], wide.shape[1], dtype=dtype)
    sum_parts_(total, thin, wide, scale)
    return total


def sum_parts_(out: Tensor, thin: Tensor, wide: Tensor, scale: float) -> None:
    """Write s·thinᵀ wide to `out` (R, D) in fp32 for thin (M, R) and wide (M, D) of half precision.

    On CPU a product of half precision is summed in fp32 and rounded. Where products of bfloat16 are fast, what the
    rounding took is therefore computed by a second one, which leaves a relative error of 2⁻¹⁷. Elsewhere, and in
    float16, whose range the sum may leave, some rows at a time are cast and added up, which also keeps the fp32 copy
    small.
    """
    if thin.dtype is torch.bfloat16 and thin.device.type == "cpu" and _multiplies_bfloat16():
        rounded = torch.mm(thin.t(), wide)
        rest = torch.addmm(rounded, thin.t(), wide, beta=-1)
        torch.add(rounded.float(), rest, out=out).mul_(scale)
        return
    rows = max(1, CAST_ELEMENTS // max(1, wide.shape[1]))
    for first in range(0, max(1, wide.shape[0]), rows):
        part = slice(first, first + rows)
        out.addmm_(thin[part].to(out.dtype).t(), wide[part].to(out.dtype), beta=int(first > 0), alpha=scale)


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Return whether oneDNN multiplies matrices of bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def side_of_input(x: Tensor, A: Tensor, index: Tensor | None, frozen: bool, p: float, seed: Tensor | None) -> Tensor:
    """Return S = D(x) Aᵀ (M, W or R) for the modules A that enter y, already in x's dtype."""
    dropped = _dropped(x, index, frozen, p, seed)
    s = _side_product(dropped, A.t(), None if frozen else index)
    if dropped is not x:
        s.mul_(1 / (1 - p))
        if frozen and index is not None:  # dropout applies to the selected modules only
            s = torch.where(_is_chosen(index, A.shape[0]), s, x @ A.t())
    return s


def forward(
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
    """Return `(y, s)` as `plora_kernels.kernels.linear.forward` does: y (M, N), s (M, W or R) or empty."""
    applied = None if frozen else index  # the modules that enter y: all if `frozen`
    A, B = entering(lora_A, lora_B, applied, x.dtype)
    s = side_of_input(x, A, index, frozen, dropout_p, dropout_seed)
    if A.shape[0] == 0:
        y = functional.linear(x, weight, bias)
    elif x.dtype.itemsize < 4:
        # y is rounded to half precision between the two products, so the larger part is computed first.
        y = functional.linear(x, weight, bias).addmm_(s, B.t(), alpha=scale)
    else:
        y = scaled_product(s, B.t(), scale) if bias is None else torch.addmm(bias, s, B.t(), alpha=scale)
        y.addmm_(x, weight.t())
    return y, s if keep_s else x.new_empty(0)


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
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)` as `plora_kernels.kernels.linear.backward`; one that is not needed has no elements."""
    d_x, d_lora_A, d_lora_B, ds = (dy.new_empty(0) for _ in range(4))  # an operator's outputs may not alias
    applied = None if frozen else index
    A, B = entering(lora_A, lora_B, applied, dy.dtype)
    kept, factor = None, scale
    if dropout_seed is not None and dropout_p > 0.0 and (index is None or index.shape[0] > 0):
        kept, factor = keep_mask(dropout_seed, x.shape[0], x.shape[1], dropout_p), scale / (1 - dropout_p)
    if need_x or need_A:
        ds = _side_product(dy, B, applied)  # (M, W or R)
    if need_x:
        chosen = _is_chosen(index, A.shape[0]) if kept is not None and frozen and index is not None else None
        d_x = _input_gradient(dy, weight, ds, A, scale, factor, kept, chosen)
    # With `frozen` every module entered y, but only the selected ones get a gradient.
    picked = index.clamp_min(0) if frozen and index is not None else None
    if need_A:
        ds = ds if picked is None else ds.index_select(1, picked)
        dropped = x if kept is None else where_kept(x, kept)
        d_lora_A = scatter(factor_gradient(ds, dropped, factor, lora_A.dtype), index, lora_A.shape[0])
    if need_B:
        s = s if picked is None else s.index_select(1, picked)
        # (Sᵀ dY)ᵀ runs about twice as fast as dYᵀ S in the CPU's matmul, because the long axis stays contiguous.
        d_lora_B = scatter(factor_gradient(s, dy, scale, lora_B.dtype), index, lora_B.shape[1]).t().contiguous()
    return d_x, d_lora_A, d_lora_B


def _input_gradient(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    A: Tensor,
    scale: float,
    factor: float,
    kept: Tensor | None,
    chosen: Tensor | None,
) -> Tensor:
    """Return dx (M, K) = dY W + s·dS A; the dropout mask `kept` applies to the part of the `chosen` modules.

    `chosen` is (R,) bool or None for all; `factor` is s without dropout, else s/(1−p).
    """
    if A.shape[0] == 0:
        return dy @ weight
    half = dy.dtype.itemsize < 4  # the larger part first, as in the forward
    if kept is None:
        return (dy @ weight).addmm_(ds, A, alpha=scale) if half else scaled_product(ds, A, scale).addmm_(dy, weight)
    dropped = scaled_product(ds if chosen is None else ds.masked_fill(~chosen, 0.0), A, factor)
    low = where_kept(dropped, kept)  # (M, K)
    if chosen is not None:
        low.addmm_(ds.masked_fill(chosen, 0.0), A, alpha=scale)
    return (dy @ weight).add_(low) if half else low.addmm_(dy, weight)


def scatter(gradient: Tensor, index: Tensor | None, rank: int) -> Tensor:
    """Return (R, D) with row t of `gradient` at module index[t] and zeros elsewhere."""
    if index is None:
        return gradient
    # Rows whose index is −1 go to one spare row at the end, so that the host need not read the index.
    out = gradient.new_zeros(rank + 1, gradient.shape[1])
    out[torch.where(index < 0, rank, index).long()] = gradient
    return out[:rank]
