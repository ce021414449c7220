"""The grouped form in plain torch: C groups of rows share one weight or have their own, and each has its own modules.

    y_g = x_g Wᵀ + bias + s_g·((D(x_g) A_gᵀ) ⊙ m_g) B_gᵀ        for the rows of every group g

The base matmul with one weight runs once over all rows. The groups' products run as batched matmuls over runs of
neighbouring groups with equally many rows: groups of one size take one call, others one call per run. No rows are
padded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from plora_kernels.counter_rng import keep_mask_of_rows
from plora_kernels.fallback.linear import CAST_ELEMENTS, sum_parts_, where_kept


class EqualGroups(NamedTuple):
    """A run of neighbouring groups first … last−1 with `size` rows each, which begin at row `row`.

    `whole` says that these are all groups. Then slicing is skipped, because a torch call takes long beside the products
    of a small layer.
    """

    first: int
    last: int
    row: int
    size: int
    whole: bool

    @property
    def is_alone(self) -> bool:
        """Whether the run is a single group."""
        return self.last - self.first == 1

    def of(self, rows: Tensor) -> Tensor:
        """Return the run's part of (M, D) as a view (groups, size, D)."""
        count = self.last - self.first
        part = rows if self.whole else rows.narrow(0, self.row, count * self.size)
        return part.view(count, self.size, rows.shape[1])

    def among(self, groups: Tensor) -> Tensor:
        """Return the run's part of (C, …)."""
        return groups if self.whole else groups[self.first : self.last]


@functools.lru_cache(maxsize=256)
def equal_groups(bounds: tuple[int, ...]) -> tuple[EqualGroups, ...]:
    """Divide groups, given by their C+1 bounds, into runs of neighbours of equal size."""
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    runs, first = [], 0
    for size, same in itertools.groupby(sizes):
        last = first + len(list(same))
        runs.append(EqualGroups(first, last, bounds[first], size, last - first == len(sizes)))
        first = last
    return tuple(runs)


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Sequence[EqualGroups]) -> Tensor:
    """Return x Wᵀ + bias (M, N) for weight (N, K) and bias (N,), or each group's own: (C, N, K) and (C, N)."""
    if weight.dim() == 2:
        return functional.linear(x, weight, bias)
    return _grouped_product(x, weight.mT, bias, runs)


def base_gradient(dy: Tensor, weight: Tensor, runs: Sequence[EqualGroups]) -> Tensor:
    """Return dY W (M, K) for weight (N, K), or for each group's own (C, N, K)."""
    return dy @ weight if weight.dim() == 2 else _grouped_product(dy, weight, None, runs)


def _grouped_product(
    rows: Tensor, matrices: Tensor, bias: Tensor | None, runs: Sequence[EqualGroups]
) -> Tensor:  # fmt: skip
    """Return rows_g · matrices_g + bias_g (M, D_OUT) for rows (M, D_IN), (C, D_IN, D_OUT), and (C, D_OUT) or None."""
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    start, beta = (out.new_zeros(()).expand(matrices.shape[0], out.shape[1]), 0) if bias is None else (bias, 1)
    for run in runs:
        if run.size == 0:
            continue
        parts, own, starts, products = run.of(rows), run.among(matrices), run.among(start), run.of(out)
        if out.dtype.itemsize >= 4 and not run.is_alone:
            torch.baddbmm(starts[:, None, :], parts, own, beta=beta, out=products)
            continue
        for one, part, matrix, product in zip(starts, parts, own, products, strict=True):
            torch.addmm(one, part, matrix, beta=beta, out=product)  # one by one as in `add_group_products_`
    return out


def bias_gradient(dy: Tensor, runs: Sequence[EqualGroups]) -> Tensor:
    """Return the sums of each group's rows of dy (M, N): (C, N)."""
    out = dy.new_empty(runs[-1].last, dy.shape[1])
    for run in runs:
        torch.sum(run.of(dy), 1, out=run.among(out))
    return out


def _gather(lora_A: Tensor, lora_B: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return every group's indexed modules, A (C, W, K) and B (C, N, W), with zeros where the index is −1."""
    if index is None:
        return lora_A, lora_B
    groups, modules = torch.arange(index.shape[0], device=index.device)[:, None], index.clamp_min(0).long()
    absent = (index < 0)[:, :, None]
    return (
        lora_A[groups, modules].masked_fill_(absent, 0.0),
        # In lora_B's memory layout: with the other one some CPUs add the product to y step by step, less exactly.
        lora_B.take_along_dim(modules[:, None, :], 2).masked_fill_(absent.mT, 0.0),
    )


def _factors(
    lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scales: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return A and B of the modules that enter y in `dtype`, with B times the groups' own scales if there are any."""
    A, B = _gather(lora_A, lora_B, index)
    scaled = B if scales is None else B * scales.to(B.dtype)[:, None, None]
    return A.to(dtype), scaled.to(dtype)


def _side_product(rows: Tensor, down: Tensor, index: Tensor | None, runs: Sequence[EqualGroups]) -> Tensor:
    """Return rows · down (M, W) for down (C, D, W): the side product S or dS.

    Columns without a module are set to zero, because their product is NaN for a row that holds infinity.
    """
    side = rows.new_empty(rows.shape[0], down.shape[2])
    for run in runs if down.shape[2] else ():
        part = run.of(side)
        torch.bmm(run.of(rows), run.among(down), out=part)
        if index is not None:
            part.masked_fill_((run.among(index) < 0)[:, None, :], 0.0)
    return side


def _are_absent(index: Tensor, rank: int) -> Tensor:
    """Return which of the R modules each group's index does not name, (C, R) bool."""
    return (index[:, :, None] != torch.arange(rank, dtype=index.dtype, device=index.device)).all(1)


def _keep(
    bounds: Sequence[int], columns: int, index: Tensor | None, p: float, seeds: Tensor | None, numbers: Tensor | None
) -> Tensor | None:
    """Return dropout's bool mask of x (M, K) from the groups' seeds and the rows' `numbers`; None without dropout.

    `numbers` (M,) are the rows' numbers in their group's mask; by default a group's rows count from 0.
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
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, s)`: y (M, N), and s (M, W or R) = D(x_g) A_gᵀ if `keep_s`, else without elements.

    Shapes: x (M, K), weight (N, K) and bias (N,), or one a group (C, N, K) and (C, N), lora_A (C, R, K), lora_B
    (C, N, R), index (C, W) int32 or None, bounds C+1 row numbers, scales (C,) times `scale` or None, dropout_seeds (C,)
    int64, dropout_rows (M,) int64 or None, the rows' numbers in their group's mask.
    """
    applied = None if frozen else index  # the modules that enter y: all if `frozen`
    A, B = _factors(lora_A, lora_B, applied, scales, x.dtype)
    runs = equal_groups(tuple(bounds))
    y = base_product(x, weight, bias, runs)
    kept = _keep(bounds, x.shape[1], index, dropout_p, dropout_seeds, dropout_rows)
    if kept is None:
        s = _side_product(x, A.mT, applied, runs)
    else:
        s = _side_product(where_kept(x, kept), A.mT, applied, runs).mul_(1 / (1 - dropout_p))
        if frozen and index is not None:  # dropout applies to the selected modules only
            plain, absent = _side_product(x, A.mT, None, runs), _are_absent(index, A.shape[1])
            for run in runs:
                run.of(s).copy_(torch.where(run.among(absent)[:, None, :], run.of(plain), run.of(s)))
    for run in runs if s.shape[1] else ():
        add_group_products_(run.of(y), run.of(s), run.among(B).mT, scale)
    return y, s if keep_s else x.new_empty(0)


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
    A, B = _factors(lora_A, lora_B, applied, scales, dy.dtype)
    runs = equal_groups(tuple(bounds))
    d_x, d_A, d_B = (dy.new_empty(0) for _ in range(3))
    kept = _keep(bounds, x.shape[1], index, dropout_p, dropout_seeds, dropout_rows)
    factor = scale if kept is None else scale / (1 - dropout_p)
    ds = _side_product(dy, B, applied, runs) if need_x or need_A else None  # (M, W or R), times the groups' own scales
    if ds is not None and need_x:
        absent = _are_absent(index, A.shape[1]) if kept is not None and frozen and index is not None else None
        d_x = _input_gradient(dy, weight, ds, A, runs, scale, factor, kept, absent)
    if ds is not None and need_A:
        dropped = x if kept is None else where_kept(x, kept)
        d_A = _factor_gradient(ds, dropped, runs, len(bounds) - 1, factor, lora_A.dtype)
    if need_B:
        # (Sᵀ dY)ᵀ runs faster than dYᵀ S in the CPU's matmul, because the long axis stays contiguous.
        d_B = _factor_gradient(s, dy, runs, len(bounds) - 1, scale, lora_B.dtype).mT
    if need_B and scales is not None:
        d_B = d_B * scales.to(d_B.dtype)[:, None, None]
    if index is not None and frozen and (need_A or need_B):
        absent = _are_absent(index, lora_A.shape[1])
        d_A = d_A.masked_fill_(absent[:, :, None], 0.0) if need_A else d_A
        d_B = d_B.masked_fill_(absent[:, None, :], 0.0) if need_B else d_B
    elif index is not None:
        d_A = _at_modules(d_A, index, lora_A.shape[1]) if need_A else d_A
        d_B = _at_modules(d_B.mT, index, lora_A.shape[1]).mT if need_B else d_B
    return d_x, d_A.contiguous(), d_B.contiguous()


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return s · left · right, batched. The product applies the scale, which saves a pass over memory."""
    return add_group_products_(left.new_empty(left.shape[0], left.shape[1], right.shape[2]), left, right, scale, beta=0)


def add_group_products_(out: Tensor, left: Tensor, right: Tensor, scale: float, beta: int = 1) -> Tensor:
    """Return beta·out + s · left · right, batched and in place."""
    if out.dtype.itemsize >= 4:
        return out.baddbmm_(left, right, beta=beta, alpha=scale)
    for one, of_left, of_right in zip(out, left, right, strict=True):
        # One `addmm_` a group: small batched products of half precision are rounded after every step of the sum.
        one.addmm_(of_left, of_right, beta=beta, alpha=scale)
    return out


def _factor_gradient(
    thin: Tensor, wide: Tensor, runs: Sequence[EqualGroups], groups: int, scale: float, dtype: torch.dtype
) -> Tensor:
    """Return s·thin_gᵀ wide_g (C, W, D) in `dtype` for thin (M, W) and wide (M, D); a group without rows gets zeros."""
    out = wide.new_empty(groups, thin.shape[1], wide.shape[1], dtype=dtype)
    for run in runs:
        write_factor_gradient_(run.among(out), run.of(thin), run.of(wide), scale)
    return out


def write_factor_gradient_(out: Tensor, thin: Tensor, wide: Tensor, scale: float) -> None:
    """Write s·thin_gᵀ wide_g to `out` (c, W, D), perhaps in fp32, for thin (c, m, W) and wide (c, m, D)."""
    if wide.dtype is out.dtype or wide.numel() <= CAST_ELEMENTS:
        add_group_products_(out, thin.to(out.dtype).mT, wide.to(out.dtype), scale, beta=0)
        return
    for one, of_thin, of_wide in zip(out, thin, wide, strict=True):
        sum_parts_(one, of_thin, of_wide, scale)


def _input_gradient(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    A: Tensor,
    runs: Sequence[EqualGroups],
    scale: float,
    factor: float,
    kept: Tensor | None,
    absent: Tensor | None,
) -> Tensor:
    """Return dx (M, K) = dY_g W_g + s·dS_g A_g; the mask `kept` applies to the part of modules that are not `absent`.

    `absent` is (C, R) bool or None if all modules are selected; `factor` is s without dropout, else s/(1−p).
    """
    d_x = base_gradient(dy, weight, runs)
    for run in runs if ds.shape[1] else ():
        part, out, A_run = run.of(ds), run.of(d_x), run.among(A)
        if kept is None:
            add_group_products_(out, part, A_run, scale)
            continue
        rest = None if absent is None else run.among(absent)[:, None, :]
        low = _scaled_product(part if rest is None else part.masked_fill(rest, 0.0), A_run, factor)
        low = where_kept(low, run.of(kept))
        if rest is not None:
            add_group_products_(low, part.masked_fill(~rest, 0.0), A_run, scale)
        out.add_(low)
    return d_x


def _at_modules(gradient: Tensor, index: Tensor, rank: int) -> Tensor:
    """Return (C, R, D) with row t of `gradient` (C, W, D) at module index[t], and zeros for all other modules."""
    # Rows whose index is −1 go to one spare row at the end, so that the host need not read the index.
    out = gradient.new_zeros(gradient.shape[0], rank + 1, gradient.shape[2])
    groups = torch.arange(index.shape[0], device=index.device)[:, None]
    out[groups, torch.where(index < 0, rank, index).long()] = gradient
    return out[:, :rank]
