"""The grouped form in plain torch: C groups of rows share one weight, each meets its own modules.

    y_g = x_g Wᵀ + bias + s_g·((D(x_g) A_gᵀ) ⊙ m_g) B_gᵀ        for the rows of every group g

The base matmul runs once over all rows. What belongs to the groups runs as batched matmuls over runs of neighbouring
groups with equally many rows, so equal groups take one call and ragged ones a call a run; nothing is padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .dropout import keep_mask_of_rows


class _Run(NamedTuple):
    """Neighbouring groups first … last−1, each of `size` rows, the first of which is row `row`."""

    first: int
    last: int
    row: int
    size: int

    @property
    def groups(self) -> slice:
        """The run's groups."""
        return slice(self.first, self.last)

    def of(self, rows: Tensor) -> Tensor:
        """Return the run's part of (M, D) as a view (groups, size, D)."""
        count = self.last - self.first
        return rows.narrow(0, self.row, count * self.size).unflatten(0, (count, self.size))


def _runs(bounds: Sequence[int]) -> list[_Run]:
    """Cut groups, given by their bounds (C+1), into runs of equal size."""
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    runs, first = [], 0
    for size, same in itertools.groupby(sizes):
        last = first + len(list(same))
        runs.append(_Run(first, last, bounds[first], size))
        first = last
    return runs


def is_merged(rows: int, groups: int, k: int, n: int, places: int, dtype: torch.dtype, dropout_p: float) -> bool:
    """Say whether W_g = W + s·B_g A_g, made for each group and call, takes fewer multiplications than rank-R products.

    Forward and backward add m·3R(N+K) to the base by rank-R products, or m·NK + 4·NKR by W_g and its gradient, for m
    rows a group. That is for small layers; the C weights then hold fewer elements than the activations. A weight of
    half precision would lose what is added to it.
    """
    if dropout_p > 0.0 or dtype.itemsize < 4 or places == 0:
        return False
    return rows * n * k + groups * 4 * n * k * places <= rows * 3 * places * (n + k)


def _gather(lora_A: Tensor, lora_B: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return every group's indexed modules, A (C, W, K) and B (C, N, W); a place whose index is −1 holds zeros."""
    if index is None:
        return lora_A, lora_B
    groups, modules = torch.arange(index.shape[0], device=index.device)[:, None], index.clamp_min(0).long()
    absent = (index < 0)[:, :, None]
    return (
        lora_A[groups, modules].masked_fill_(absent, 0.0),
        lora_B.mT[groups, modules].masked_fill_(absent, 0.0).mT,
    )


def _factors(lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return A and B of the modules that enter, B times the groups' own scales where there are any."""
    A, B = _gather(lora_A, lora_B, index)
    return A, B if scales is None else B * scales.to(B.dtype)[:, None, None]


def _side_product(rows: Tensor, down: Tensor, index: Tensor | None, runs: Sequence[_Run]) -> Tensor:
    """Return rows · down (M, W) for down (C, D, W), zero at places without a module even where a row holds infinity."""
    side = rows.new_empty(rows.shape[0], down.shape[2])
    for run in runs:
        part = run.of(side)
        torch.bmm(run.of(rows), down[run.groups], out=part)
        if index is not None:
            part.masked_fill_((index[run.groups] < 0)[:, None, :], 0.0)
    return side


def _are_chosen(index: Tensor, rank: int) -> Tensor:
    """Return which of the R modules each group's index names, (C, R) bool."""
    return (index[:, :, None] == torch.arange(rank, dtype=index.dtype, device=index.device)).any(1)


def _keep(
    bounds: Sequence[int], columns: int, index: Tensor | None, p: float, seeds: Tensor | None, numbers: Tensor | None
) -> Tensor | None:
    """Return what dropout keeps of x (M, K), each group by its seed; None without dropout.

    A row is known by its number (M,), by default counted from 0 in its group.
    """
    if seeds is None or p == 0.0 or (index is not None and index.shape[1] == 0):
        return None
    sizes = torch.tensor([end - start for start, end in itertools.pairwise(bounds)], device=seeds.device)
    if numbers is None:
        starts = torch.tensor(bounds[:-1], device=seeds.device).repeat_interleave(sizes)
        numbers = torch.arange(bounds[-1], device=seeds.device) - starts
    return keep_mask_of_rows(seeds.repeat_interleave(sizes), numbers, columns, p)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    bounds: Sequence[int],
    scales: Tensor | None,
    scale: float,
    frozen: bool,
    keep_s: bool,
    merged: bool,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, s)`: y (M, N), and s (M, places) = D(x_g) A_gᵀ if `keep_s`, else without elements.

    Shapes: x (M, K), weight (N, K), lora_A (C, R, K), lora_B (C, N, R), bias (N,), index (C, W) int32 or None, bounds
    C+1 row numbers, scales (C,) times `scale` or None, dropout_seeds (C,) int64, dropout_rows (M,) int64 or None, the
    rows' numbers in their group's mask. `merged` is `is_merged`'s answer.
    """
    applied = None if frozen else index  # frozen modules all enter y
    A, B = _factors(lora_A, lora_B, applied, scales)
    runs = _runs(bounds)
    if merged:
        y, mains = x.new_empty(x.shape[0], weight.shape[0]), torch.baddbmm(weight, B, A, alpha=scale)  # (C, N, K)
        for run in runs:
            _product(run.of(x), mains[run.groups].mT, bias, out=run.of(y))
        return y, x.new_empty(0)
    y = functional.linear(x, weight, bias)
    kept = _keep(bounds, x.shape[1], index, dropout_p, dropout_seeds, dropout_rows)
    if kept is None:
        s = _side_product(x, A.mT, applied, runs)
    else:
        s = _side_product(x.masked_fill(kept.logical_not_(), 0.0), A.mT, applied, runs).mul_(1 / (1 - dropout_p))
        if frozen and index is not None:  # dropout touches the selected modules only
            plain, chosen = _side_product(x, A.mT, None, runs), _are_chosen(index, A.shape[1])
            for run in runs:
                run.of(s).copy_(torch.where(chosen[run.groups, None, :], run.of(s), run.of(plain)))
    for run in runs:
        _add_product_(run.of(y), run.of(s), B[run.groups].mT, scale)
    return y, s if keep_s else x.new_empty(0)


def _product(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write left · right + bias into `out`, batched."""
    if bias is None:
        torch.bmm(left, right, out=out)
    else:
        torch.baddbmm(bias, left, right, out=out)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    index: Tensor | None,
    bounds: Sequence[int],
    scales: Tensor | None,
    scale: float,
    frozen: bool,
    merged: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)`, (M, K), (C, R, K) and (C, N, R); a gradient that is not needed has no elements.

    Unselected modules get zeros, and so does a group without rows.
    """
    applied = None if frozen else index
    A, B = _factors(lora_A, lora_B, applied, scales)
    runs = _runs(bounds)
    if merged:
        d_x = _merged_input_gradient(dy, weight, A, B, runs, scale) if need_x else dy.new_empty(0)
        d_A, d_B = _merged_factor_gradients(dy, x, A, B, runs, scale, need_A, need_B)
    else:
        d_x, d_A, d_B = (dy.new_empty(0) for _ in range(3))
        kept = _keep(bounds, x.shape[1], index, dropout_p, dropout_seeds, dropout_rows)
        factor = scale if kept is None else scale / (1 - dropout_p)
        ds = _side_product(dy, B, applied, runs) if need_x or need_A else None  # (M, places), times the scales
        if ds is not None and need_x:
            chosen = _are_chosen(index, A.shape[1]) if kept is not None and frozen and index is not None else None
            d_x = _input_gradient(dy, weight, ds, A, runs, scale, factor, kept, chosen)
        if ds is not None and need_A:
            dropped = x if kept is None else x.masked_fill(kept.logical_not_(), 0.0)
            d_A = _factor_gradient(ds, dropped, runs, len(bounds) - 1, factor)
        if need_B:
            # (Sᵀ dY)ᵀ runs faster than dYᵀ S in the CPU's matmul: the long axis stays contiguous.
            d_B = _factor_gradient(s, dy, runs, len(bounds) - 1, scale).mT
    if need_A:
        d_A = _at_modules(d_A, index, frozen, lora_A.shape[1]).contiguous()
    if need_B:
        d_B = d_B if scales is None else d_B * scales.to(d_B.dtype)[:, None, None]
        d_B = _at_modules(d_B.mT, index, frozen, lora_A.shape[1]).mT.contiguous()
    return d_x, d_A, d_B


def _merged_input_gradient(
    dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, runs: Sequence[_Run], scale: float
) -> Tensor:
    """Return dx (M, K) = dY_g W_g with W_g = W + s·B_g A_g made anew: cheaper than kept."""
    d_x, mains = dy.new_empty(dy.shape[0], weight.shape[1]), torch.baddbmm(weight, B, A, alpha=scale)  # (C, N, K)
    for run in runs:
        torch.bmm(run.of(dy), mains[run.groups], out=run.of(d_x))
    return d_x


def _merged_factor_gradients(
    dy: Tensor, x: Tensor, A: Tensor, B: Tensor, runs: Sequence[_Run], scale: float, need_A: bool, need_B: bool
) -> tuple[Tensor, Tensor]:
    """Return dA (C, W, K) = s·B_gᵀ G_g and dB (C, N, W) = s·G_g A_gᵀ by W_g's own gradient G_g = dY_gᵀ x_g (N, K)."""
    d_A, d_B = dy.new_empty(0), dy.new_empty(0)  # an operator's outputs may not alias
    if need_A or need_B:
        gradient = dy.new_empty(A.shape[0], dy.shape[1], x.shape[1])
        for run in runs:
            torch.bmm(run.of(dy).mT, run.of(x), out=gradient[run.groups])
        d_A = _scaled_product(B.mT, gradient, scale) if need_A else d_A
        d_B = _scaled_product(gradient, A.mT, scale) if need_B else d_B
    return d_A, d_B


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return s · left · right, batched, the scale applied inside the product: no pass of its own."""
    return _add_product_(left.new_empty(left.shape[0], left.shape[1], right.shape[2]), left, right, scale, beta=0)


def _add_product_(out: Tensor, left: Tensor, right: Tensor, scale: float, beta: int = 1) -> Tensor:
    """Return beta·out + s · left · right, batched and in place."""
    if out.dtype.itemsize >= 4:
        return out.baddbmm_(left, right, beta=beta, alpha=scale)
    for one, of_left, of_right in zip(out, left, right, strict=True):
        # Small batched products of half precision are rounded after every step of the sum.
        one.addmm_(of_left, of_right, beta=beta, alpha=scale)
    return out


def _factor_gradient(thin: Tensor, wide: Tensor, runs: Sequence[_Run], groups: int, scale: float) -> Tensor:
    """Return s·thin_gᵀ wide_g (C, W, D) for thin (M, W) and wide (M, D): zero for a group without rows."""
    out = wide.new_empty(groups, thin.shape[1], wide.shape[1])
    for run in runs:
        _add_product_(out[run.groups], run.of(thin).mT, run.of(wide), scale, beta=0)
    return out


def _input_gradient(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    A: Tensor,
    runs: Sequence[_Run],
    scale: float,
    factor: float,
    kept: Tensor | None,
    chosen: Tensor | None,
) -> Tensor:
    """Return dx (M, K) = dY W + s·dS_g A_g, where `kept` drops what the `chosen` modules (None: all) add.

    `factor` is s, over 1−p under dropout.
    """
    d_x = dy @ weight
    for run in runs:
        part, out, A_run = run.of(ds), run.of(d_x), A[run.groups]
        if kept is None:
            _add_product_(out, part, A_run, scale)
            continue
        rest = None if chosen is None else chosen[run.groups, None, :]
        low = _scaled_product(part if rest is None else part.masked_fill(~rest, 0.0), A_run, factor)
        low.mul_(run.of(kept))
        if rest is not None:
            _add_product_(low, part.masked_fill(rest, 0.0), A_run, scale)
        out.add_(low)
    return d_x


def _at_modules(gradient: Tensor, index: Tensor | None, frozen: bool, rank: int) -> Tensor:
    """Return (C, R, D) with zeros for modules no index names.

    Frozen, `gradient` holds a row for each module; folded, row t of it is module index[t].
    """
    if index is None:
        return gradient
    if frozen:
        return gradient.masked_fill_(~_are_chosen(index, rank)[:, :, None], 0.0)
    # One spare row takes what belongs to no module, so that no place has to be read on the host.
    out = gradient.new_zeros(gradient.shape[0], rank + 1, gradient.shape[2])
    groups = torch.arange(index.shape[0], device=index.device)[:, None]
    out[groups, torch.where(index < 0, rank, index).long()] = gradient
    return out[:, :rank]
