"""The linear operator in plain torch: it runs on CPU, and on other devices where the Triton kernels do not run.

One of the base matmul and the rank-R product adds to the result of the other (`addmm_`), so that no second (M, N)
tensor is made. In fp32 and float64 the rank-R product comes first; in half precision, which rounds between the two,
the base matmul does. The modules that enter y are gathered, and the side product S = D(x) Aᵀ is kept for the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plora_kernels.counter_rng import keep_mask


def gather(lora_A: Tensor, lora_B: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the indexed modules as A (W, K) and B (N, W), with zeros where the index is −1."""
    if index is None:
        return lora_A, lora_B
    modules, absent = index.clamp_min(0), index < 0
    return (
        lora_A.index_select(0, modules).masked_fill_(absent[:, None], 0.0),
        lora_B.index_select(1, modules).masked_fill_(absent, 0.0),
    )


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
    return torch.where(keep_mask(seed, x.shape[0], x.shape[1], p), x, 0.0)


def _is_chosen(index: Tensor, rank: int) -> Tensor:
    """Return which of the R modules an index names, (R,) bool, without reading it on the host."""
    return (index[:, None] == torch.arange(rank, dtype=index.dtype, device=index.device)).any(0)


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return s · left · right. The product applies the scale: no extra pass, and no overflow before scaling."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


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
    A, B = gather(lora_A, lora_B, applied)
    dropped = _dropped(x, index, frozen, dropout_p, dropout_seed)
    s = _side_product(dropped, A.t(), applied)  # (M, W or R)
    if dropped is not x:
        s.mul_(1 / (1 - dropout_p))
        if frozen and index is not None:  # dropout applies to the selected modules only
            s = torch.where(_is_chosen(index, A.shape[0]), s, x @ A.t())
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
    A, B = gather(lora_A, lora_B, applied)
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
        dropped = x if kept is None else torch.where(kept, x, 0.0)
        d_lora_A = scatter(scaled_product(ds.t(), dropped, factor), index, lora_A.shape[0])
    if need_B:
        s = s if picked is None else s.index_select(1, picked)
        # (Sᵀ dY)ᵀ runs about twice as fast as dYᵀ S in the CPU's matmul, because the long axis stays contiguous.
        d_lora_B = scatter(scaled_product(s.t(), dy, scale), index, lora_B.shape[1]).t().contiguous()
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
    low = torch.where(kept, dropped, 0.0)  # (M, K)
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
