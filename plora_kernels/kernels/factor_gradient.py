"""dA and dB of the selected modules, deterministically: no atomics on floats.

Both are G = s·Lᵀ X over the rows, with L (M, R) thin and X (M, D) wide:

    dA  = s·dSᵀ D(x)   (R, K)      L = dS = dY B,   X = D(x), dropout of the layer if it has one
    dBᵀ = s·Sᵀ dY      (R, N)      L = S = D(x) Aᵀ, X = dY

S and dS are the side products of forward and backward (`side_product.py`). The rows are split such that the device is
filled, and a second launch adds the splits' fp32 partial sums in order. For groups of rows there is one G per group,
from its own rows and with its own scale; a group without rows gets zeros.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.device_functions import keep_mask, load_modules
from plora_kernels.kernels.grouped_tiles import Groups, row_numbers
from plora_kernels.kernels.launch import (
    Dropout,
    DropoutArguments,
    cdiv,
    constants,
    dot_precision,
    dtype_name,
    is_aligned,
    launches_dependents,
    strides,
)
from plora_kernels.kernels.replay import empty, launch
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import GradientBlocks, ShapeClass, beside_product, row_splits
from plora_kernels.tuning.lookup import find_blocks


@triton.jit
def store_sum(
    out_ptr,
    index_ptr,
    acc,
    r0,
    R,
    columns,
    column_ok,
    scale,
    stride_or,
    stride_od,
    BLOCK_R: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Store acc (BLOCK_D, BLOCK_R) transposed into rows of out, for r = r0 … r0+BLOCK_R−1.

    A WHOLE sum is the gradient: s · acc, rounded once, goes to out[module(r), d]; module(r) is index[r] if there is an
    index (−1 stores nothing), else r. A partial one goes to out[r, d] as it is, fp32 and contiguous along d.
    """
    if WHOLE:
        modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, tl.int64)
        tile = out_ptr + modules[None, :] * stride_or + columns[:, None] * stride_od
        tl.store(tile, (acc * scale).to(out_ptr.dtype.element_ty), mask=column_ok[:, None] & module_ok[None, :])
    else:
        places = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)  # (BLOCK_R,)
        tile = out_ptr + places[None, :] * stride_or + columns[:, None]
        tl.store(tile, acc, mask=column_ok[:, None] & (places < R)[None, :])


@triton.jit(do_not_specialize=["splits"])
def partial_gradient_kernel(
    thin_ptr,
    wide_ptr,
    index_ptr,
    out_index_ptr,
    offsets_ptr,
    scales_ptr,
    seed_ptr,
    numbers_ptr,
    out_ptr,
    M,
    D,
    R,
    splits,
    split_rows,
    drop_threshold,
    scale,
    stride_tm,
    stride_tr,
    stride_wm,
    stride_wd,
    stride_og,
    stride_or,
    stride_od,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WHOLE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    LAUNCHES_DEPENDENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum one split's rows: out[split, r, d] = Σ_m thin[m, column(r)] · wide[m, d], fp32; if WHOLE, the gradient.

    thin (M, ·), wide (M, D), out (splits, R, D); column(r) is index[r] if there is an index (−1 gives zero), else r. If
    WHOLE there is one split, and out is the gradient itself: see `store_sum`, with out_index (R,).
    With a seed the dropped elements of `wide` count as zero. With offsets (C+1,), which give each group's rows, out is
    (C · splits, R, D), the indices are (C, R), seed (C,), and scales (C,) and numbers (M,) may be None.
    """
    if LAUNCHES_DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(2)
    if offsets_ptr is not None:
        group = part // splits
        start = tl.load(offsets_ptr + group).to(tl.int32)
        end = tl.load(offsets_ptr + group + 1).to(tl.int32)
        # A split is a whole number of row blocks, so that no block lies in two splits.
        split_rows = tl.cdiv(tl.cdiv(end - start, splits), BLOCK_M) * BLOCK_M
        first = (start + (part % splits) * split_rows).to(tl.int64)
        last = tl.minimum(first + split_rows, end)
        if index_ptr is not None:
            index_ptr += group * R
        if out_index_ptr is not None:
            out_index_ptr += group * R
        if seed_ptr is not None:
            seed_ptr += group
        if scales_ptr is not None:
            scale *= tl.load(scales_ptr + group)
    else:
        start = 0
        first = part.to(tl.int64) * split_rows
        last = tl.minimum(first + split_rows, M)
    columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # (BLOCK_D,)
    r0 = tl.program_id(1) * BLOCK_R
    thin_columns, thin_ok = load_modules(index_ptr, r0, R, BLOCK_R, tl.int64)
    column_ok = columns < D

    # Computed as the transpose, (D, R): wgmma has 64 rows, of which a product with 16 modules as rows would fill 16.
    acc = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    for m in range(0, split_rows, BLOCK_M):
        rows = first + m + tl.arange(0, BLOCK_M).to(tl.int64)  # (BLOCK_M,)
        row_ok = rows < last
        wide_tile = wide_ptr + columns[:, None] * stride_wd + rows[None, :] * stride_wm
        w = tl.load(wide_tile, mask=column_ok[:, None] & row_ok[None, :], other=0.0)  # (BLOCK_D, BLOCK_M)
        if seed_ptr is not None:
            numbers = row_numbers(numbers_ptr, first + m, first + m - start, row_ok, BLOCK_M)
            keep = keep_mask(seed_ptr, numbers, tl.program_id(0) * BLOCK_D, drop_threshold, BLOCK_D)
            w = tl.where(keep.trans(), w, 0.0)
        thin_tile = thin_ptr + rows[:, None] * stride_tm + thin_columns[None, :] * stride_tr
        thin_mask = row_ok[:, None] & thin_ok[None, :]
        if DEPENDENT:  # ".cg" bypasses the L1 cache: `thin` comes from a launch that this one did not wait for
            t = tl.load(thin_tile, mask=thin_mask, other=0.0, cache_modifier=".cg")  # (BLOCK_M, BLOCK_R)
        else:
            t = tl.load(thin_tile, mask=thin_mask, other=0.0)  # (BLOCK_M, BLOCK_R)
        acc = tl.dot(w, t, acc, input_precision=PRECISION)  # (BLOCK_D, BLOCK_R) fp32
    out_ptr += part.to(tl.int64) * stride_og
    store_sum(
        out_ptr, out_index_ptr, acc, r0, R, columns, column_ok, scale, stride_or, stride_od, BLOCK_R, WHOLE,
    )  # fmt: skip
    if DEPENDENT:
        # The launch before may still run. This one does not load its results, but a later launch may, so this launch
        # must not end before that one has.
        if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
            tl.extra.cuda.gdc_wait()


@triton.jit
def reduce_gradient_kernel(
    partial_ptr,
    index_ptr,
    scales_ptr,
    out_ptr,
    D,
    R,
    splits,
    scale,
    stride_ps,
    stride_pr,
    stride_og,
    stride_or,
    stride_od,
    BLOCK_D: tl.constexpr,
    BY_MODULE: tl.constexpr,
):
    """Add the splits in order, scale, round once and store in the module's row: out[module(r), d].

    partial (splits, R, D) fp32 has a row per entry of the index, or per module if BY_MODULE; out is addressed by
    (module, d); an entry −1 stores nothing. For groups all of them have a leading axis, and scales (C,) may give each
    group its own scale.
    """
    place, group = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # (BLOCK_D,)
    ok = columns < D
    module = place
    if index_ptr is not None:
        module = tl.load(index_ptr + group * R + place).to(tl.int64)
    if scales_ptr is not None:
        scale *= tl.load(scales_ptr + group)
    if module >= 0:
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        row = module if BY_MODULE else place
        tile = partial_ptr + group * splits * stride_ps + row * stride_pr + columns
        for _ in range(splits):
            acc += tl.load(tile, mask=ok, other=0.0)  # (BLOCK_D,) fp32
            tile += stride_ps
        out_tile = out_ptr + group * stride_og + module * stride_or + columns * stride_od
        tl.store(out_tile, (acc * scale).to(out_ptr.dtype.element_ty), mask=ok)


class Sums(NamedTuple):
    """How a gradient of `width` rows is summed; `partial` is (C · splits, width, D) fp32, or the gradient if whole."""

    width: int
    blocks: GradientBlocks
    splits: int
    partial: Tensor


def plan_sums(
    out: Tensor,
    wide: Tensor,
    width: int,
    *,
    dropout: Dropout | None = None,
    groups: Groups | None = None,
    beside: bool = False,
) -> Sums:
    """Return how a gradient of `width` rows is summed, and allocate its partial sums.

    With `beside` its programs leave room on the multiprocessors for those of the product.
    """
    (rows, d), count = wide.shape, 1 if groups is None else groups.total
    rows_each = max(1, rows // count)
    shape = ShapeClass("factor_gradient", dtype_name(wide.dtype), rows_each, d, width, width)
    blocks = find_blocks(GradientBlocks, shape, wide.device, is_aligned(wide))
    wide_tiles = wide.dtype.itemsize >= 4 or not is_aligned(wide)
    if (groups is not None and wide_tiles) or (dropout is not None and wide.dtype.itemsize >= 4):
        # The dropout mask and the group arguments take registers. Tiles of fp32, or with unaligned loads, would spill.
        blocks = replace(blocks, block_d=min(blocks.block_d, 64))
    if beside and launches_dependents(wide.device):
        blocks = beside_product(blocks, shape.dtype)
    programs = cdiv(d, blocks.block_d) * cdiv(width, blocks.block_r) * count
    multiprocessors = lookup.multiprocessors_of(wide.device)
    splits = row_splits(rows_each, width, programs, blocks.block_m, blocks.waves, multiprocessors)
    partial = out if splits == 1 else empty((count * splits, width, d), torch.float32, wide.device)
    return Sums(width, blocks, splits, partial)


def factor_gradient_(
    out: Tensor,
    thin: Tensor,
    wide: Tensor,
    *,
    thin_index: Tensor | None,
    out_index: Tensor | None,
    scale: float,
    dropout: Dropout | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """Write s·thinᵀ·D(wide) into the rows of `out` (R, D) and return it; with groups, of each group into out (C, R, D).

    Args:
        out: any strides; rows that `out_index` does not name are not written.
        thin: (M, ·), the side product; `thin_index` (W,) names the columns to use, None takes all in order.
        wide: (M, D).
        out_index: (W,) int32, the row of `out` for every column used; −1 stores nothing; None stores in order.
        dropout: D, of the elements of `wide`; None keeps all.
        groups: indices are (C, W) then, seeds (C,), and `scale` multiplies the groups' own scales.
    """
    index = thin_index if thin_index is not None else out_index
    width = thin.shape[1] if index is None else index.shape[-1]
    if width > 0 and wide.shape[1] > 0:
        sums = plan_sums(out, wide, width, dropout=dropout, groups=groups)
        sum_parts_(
            sums, thin, wide, thin_index=thin_index, out_index=out_index, scale=scale, dropout=dropout, groups=groups
        )
        add_parts_(out, sums, out_index=out_index, scale=scale, dropout=dropout, groups=groups)
    return out


def sum_parts_(
    sums: Sums,
    thin: Tensor,
    wide: Tensor,
    *,
    thin_index: Tensor | None,
    out_index: Tensor | None,
    scale: float,
    dropout: Dropout | None = None,
    groups: Groups | None = None,
    beside: bool = False,
    leads: bool = False,
) -> None:
    """Write the partial sums of a gradient, for `add_parts_`; one part is already the gradient.

    Arguments are those of `factor_gradient_`. With `beside` this launch runs beside the one before it, by programmatic
    dependent launch where the device has it. That launch must trigger its dependents and not write `thin` or `wide`,
    and `sums` must be made before it, by `plan_sums(…, beside=True)`: memory allocated later may still be in use. With
    `leads` the next launch may run beside this one.
    """
    (rows, d), count = wide.shape, 1 if groups is None else groups.total
    width, blocks, splits, partial = sums
    tiles_d, tiles_r = cdiv(d, blocks.block_d), cdiv(width, blocks.block_r)
    # A split is a whole number of row blocks, so that no block lies in two splits.
    split_rows = cdiv(cdiv(rows, splits), blocks.block_m) * blocks.block_m
    whole, dropped = splits == 1, DropoutArguments.of(dropout)
    scale *= dropped.keep_scale
    scales = groups.scales if groups is not None and whole else None
    shares = launches_dependents(wide.device)
    dependent = beside and shares
    with torch.cuda.device_of(wide):
        launch(
            partial_gradient_kernel,
            (tiles_d, tiles_r, count * splits),
            *(thin, wide, thin_index, out_index, None if groups is None else groups.offsets, scales),
            *(dropped.seed, dropped.numbers, partial),
            *(rows, d, width, splits, split_rows),
            dropped.threshold,
            scale * groups.scale if groups is not None else scale,
            *strides(thin, wide),
            *(partial.stride() if partial.dim() == 3 else (0, *partial.stride())),
            **constants(blocks),
            WHOLE=whole,
            DEPENDENT=dependent,
            LAUNCHES_DEPENDENTS=leads and shares,
            PRECISION=dot_precision(wide.dtype),
            shares_multiprocessors=dependent,
            **({"launch_pdl": True} if dependent else {}),
        )


def add_parts_(
    out: Tensor,
    sums: Sums,
    *,
    out_index: Tensor | None,
    scale: float,
    dropout: Dropout | None = None,
    groups: Groups | None = None,
) -> None:
    """Add the partial sums of `sum_parts_` to the gradient `out`, with the same arguments."""
    if sums.splits > 1:
        scale *= DropoutArguments.of(dropout).keep_scale
        reduce_partials_(out, sums.partial, index=out_index, by_module=False, scale=scale, groups=groups)


def reduce_partials_(
    out: Tensor,
    partial: Tensor,
    *,
    index: Tensor | None,
    by_module: bool,
    scale: float,
    groups: Groups | None = None,
) -> None:
    """Write the sum of partial (splits, R, D) fp32 over its splits to out (R, D), scaled and rounded once.

    out has any strides. With an index, row t of `partial`, or row index[t] if `by_module`, goes to row index[t] of out;
    an entry −1 is skipped. With groups, partial is (C · splits, R, D), out (C, R, D) and the index (C, W).
    """
    parts, width, d = partial.shape
    places, count = width if index is None else index.shape[-1], 1 if groups is None else groups.total
    if places == 0:
        return
    with torch.cuda.device_of(out):
        launch(
            reduce_gradient_kernel,
            (cdiv(d, 1024), places, count),
            *(partial, index, None if groups is None else groups.scales, out),
            *(d, places, parts // count),
            scale * groups.scale if groups is not None else scale,
            *partial.stride()[:2],
            *(out.stride() if groups is not None else (0, *out.stride())),
            BLOCK_D=1024,
            BY_MODULE=by_module,
            num_warps=4,
        )
