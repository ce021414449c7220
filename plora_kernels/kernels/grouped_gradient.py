"""dA and dB of every group's modules: G_g = s_g·L_gᵀ X_g over the group's rows, deterministically.

As `factor_gradient`, which says what L and X are. A group's rows are cut into a fixed number of splits whose partial
sums (fp32) a second launch adds in order; a group without rows gets zeros.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import GradientBlocks, ShapeClass
from ..configs import find_blocks
from ..dropout import threshold
from .grouped_tiles import Groups, row_numbers
from .launch import Dropout, dot_precision, dtype_name, is_aligned
from .modules import keep_mask


@triton.jit
def grouped_partial_kernel(
    thin_ptr,
    wide_ptr,
    index_ptr,
    offsets_ptr,
    seed_ptr,
    numbers_ptr,
    partial_ptr,
    D,
    R,
    splits,
    drop_threshold,
    stride_tm,
    stride_tr,
    stride_wm,
    stride_wd,
    stride_ps,
    stride_pr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    DROPOUT: tl.constexpr,
    NUMBERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum one split of one group: partial[group·splits + split, r, d] = Σ_m thin[m, column(r)] · wide[m, d], fp32.

    thin (M, ·), wide (M, D), offsets (C+1,), seed (C,), numbers (M,) or unused unless NUMBERED; column(r) is
    index[group, r] where there is one (−1 gives zero), else r. With DROPOUT the elements of `wide`
    that it drops count as zero.
    """
    part = tl.program_id(2)
    group = part // splits
    start = tl.load(offsets_ptr + group).to(tl.int32)
    end = tl.load(offsets_ptr + group + 1).to(tl.int32)
    columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # (BLOCK_D,)
    places = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)  # (BLOCK_R,)
    column_ok, place_ok = columns < D, places < R
    thin_ok, thin_columns = place_ok, places
    if HAS_INDEX:
        modules = tl.load(index_ptr + group * R + places, mask=place_ok, other=-1)
        thin_ok = modules >= 0
        thin_columns = tl.where(thin_ok, modules, 0).to(tl.int64)

    # Whole blocks a split, so that no row block straddles two of them.
    split_rows = tl.cdiv(tl.cdiv(end - start, splits), BLOCK_M) * BLOCK_M
    first = start + (part % splits) * split_rows
    last = tl.minimum(first + split_rows, end)
    # Transposed, with the wide axis first: a product 16 modules high would leave three quarters of wgmma's rows empty.
    acc = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    for m in range(first, last, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M).to(tl.int64)  # (BLOCK_M,)
        row_ok = rows < last
        wide_tile = wide_ptr + columns[:, None] * stride_wd + rows[None, :] * stride_wm
        w = tl.load(wide_tile, mask=column_ok[:, None] & row_ok[None, :], other=0.0)  # (BLOCK_D, BLOCK_M)
        if DROPOUT:
            numbers = row_numbers(numbers_ptr + m, m - start, row_ok, BLOCK_M, NUMBERED)
            keep = keep_mask(seed_ptr + group, numbers, tl.program_id(0) * BLOCK_D, drop_threshold, BLOCK_D)
            w = tl.where(keep.trans(), w, 0.0)
        thin_tile = thin_ptr + rows[:, None] * stride_tm + thin_columns[None, :] * stride_tr
        t = tl.load(thin_tile, mask=row_ok[:, None] & thin_ok[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        acc = tl.dot(w, t, acc, input_precision=PRECISION)  # (BLOCK_D, BLOCK_R) fp32
    tile = partial_ptr + part.to(tl.int64) * stride_ps + places[None, :] * stride_pr + columns[:, None]
    tl.store(tile, acc, mask=column_ok[:, None] & place_ok[None, :])


@triton.jit
def grouped_reduce_kernel(
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
    HAS_INDEX: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Add a group's splits in order, scale, round once and store at the module's own row: out[group, module(r), d].

    partial (C·splits, R, D) fp32; out addressed by (group, module, d); a place whose index is −1 stores nothing.
    """
    place, group = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # (BLOCK_D,)
    ok = columns < D
    module = place
    if HAS_INDEX:
        module = tl.load(index_ptr + group * R + place).to(tl.int64)
    if HAS_SCALES:
        scale *= tl.load(scales_ptr + group)
    if module >= 0:
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        tile = partial_ptr + group * splits * stride_ps + place * stride_pr + columns
        for _ in range(splits):
            acc += tl.load(tile, mask=ok, other=0.0)  # (BLOCK_D,) fp32
            tile += stride_ps
        out_tile = out_ptr + group * stride_og + module * stride_or + columns * stride_od
        tl.store(out_tile, (acc * scale).to(out_ptr.dtype.element_ty), mask=ok)


def grouped_gradient_(
    out: Tensor,
    thin: Tensor,
    wide: Tensor,
    groups: Groups,
    *,
    thin_index: Tensor | None,
    out_index: Tensor | None,
    dropout: Dropout | None = None,
) -> None:
    """Write s_g·thin_gᵀ·D(wide_g) into the rows of out[g], out (C, R, D) of any strides.

    Args:
        thin: (M, ·), the side product; `thin_index` (C, W) names the columns to use, None takes all in order.
        wide: (M, D).
        out_index: (C, W) int32, the row of out[g] for every place; −1 stores nothing; None stores in order.
        dropout: D, of the elements of `wide`, with a seed a group; None keeps all.
    """
    (rows, d), index = wide.shape, thin_index if thin_index is not None else out_index
    width = thin.shape[1] if index is None else index.shape[1]
    if width == 0 or d == 0:
        return
    rows_each = max(1, rows // groups.total)
    shape = ShapeClass("factor_gradient", dtype_name(wide.dtype), rows_each, d, width, width)
    blocks = find_blocks(GradientBlocks, shape, wide.device, is_aligned(wide))
    if wide.dtype is torch.float32:  # what tells groups apart takes a few registers more: a full tile would spill
        blocks = replace(blocks, block_d=min(blocks.block_d, 64))
    splits = max(1, min(triton.cdiv(blocks.splits, groups.total), triton.cdiv(rows_each, blocks.block_m)))
    partial = torch.empty((groups.total * splits, width, d), dtype=torch.float32, device=wide.device)
    with torch.cuda.device_of(wide):
        grouped_partial_kernel[(triton.cdiv(d, blocks.block_d), triton.cdiv(width, blocks.block_r), partial.shape[0])](
            thin,
            wide,
            thin_index if thin_index is not None else groups.offsets,
            groups.offsets,
            dropout.seed if dropout is not None else groups.offsets,
            dropout.numbers if dropout is not None and dropout.numbers is not None else groups.offsets,
            partial,
            d,
            width,
            splits,
            threshold(dropout.p) if dropout is not None else 0,
            *thin.stride(),
            *wide.stride(),
            partial.stride(0),
            partial.stride(1),
            BLOCK_M=blocks.block_m,
            BLOCK_D=blocks.block_d,
            BLOCK_R=blocks.block_r,
            HAS_INDEX=thin_index is not None,
            DROPOUT=dropout is not None,
            NUMBERED=dropout is not None and dropout.numbers is not None,
            PRECISION=dot_precision(wide.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        grouped_reduce_kernel[(triton.cdiv(d, 1024), width, groups.total)](
            partial,
            out_index if out_index is not None else groups.offsets,
            groups.scales if groups.scales is not None else partial,
            out,
            d,
            width,
            splits,
            groups.scale / (1 - dropout.p) if dropout is not None else groups.scale,
            partial.stride(0),
            partial.stride(1),
            *out.stride(),
            BLOCK_D=1024,
            HAS_INDEX=out_index is not None,
            HAS_SCALES=groups.scales is not None,
            num_warps=4,
        )
