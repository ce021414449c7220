"""dA and dB of the selected modules, deterministically: no atomics on floats.

Both are G = s·Lᵀ X over the rows, with L (M, R) thin and X (M, D) wide:

    dA  = s·dSᵀ D(x)   (R, K)      L = dS = dY B,   X = D(x), dropout of the layer if it has one
    dBᵀ = s·Sᵀ dY      (R, N)      L = S = D(x) Aᵀ, X = dY

The rows are cut into a fixed number of splits whose partial sums (fp32) a second launch adds in order.
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
from .launch import Dropout, cdiv, dot_precision, dtype_name, is_aligned
from .modules import keep_mask


@triton.jit
def partial_gradient_kernel(
    thin_ptr,
    wide_ptr,
    index_ptr,
    seed_ptr,
    partial_ptr,
    M,
    D,
    R,
    split_rows,
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
    PRECISION: tl.constexpr,
):
    """Sum one split's rows: partial[split, r, d] = Σ_m thin[m, column(r)] · wide[m, d], fp32.

    thin (M, ·), wide (M, D), partial (splits, R, D); column(r) is index[r] when there is one (−1 gives zero), else r.
    With DROPOUT the elements of `wide` that it drops count as zero.
    """
    split = tl.program_id(2)
    columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # (BLOCK_D,)
    places = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)  # (BLOCK_R,)
    column_ok, place_ok = columns < D, places < R
    thin_ok, thin_columns = place_ok, places
    if HAS_INDEX:
        modules = tl.load(index_ptr + places, mask=place_ok, other=-1)
        thin_ok = modules >= 0
        thin_columns = tl.where(thin_ok, modules, 0).to(tl.int64)

    first = split.to(tl.int64) * split_rows
    last = tl.minimum(first + split_rows, M)
    # Transposed, with the wide axis first: a product 16 modules high would leave three quarters of wgmma's rows empty.
    acc = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    for m in range(0, split_rows, BLOCK_M):
        rows = first + m + tl.arange(0, BLOCK_M).to(tl.int64)  # (BLOCK_M,)
        row_ok = rows < last
        wide_tile = wide_ptr + columns[:, None] * stride_wd + rows[None, :] * stride_wm
        w = tl.load(wide_tile, mask=column_ok[:, None] & row_ok[None, :], other=0.0)  # (BLOCK_D, BLOCK_M)
        if DROPOUT:
            keep = keep_mask(seed_ptr, rows, tl.program_id(0) * BLOCK_D, drop_threshold, BLOCK_D)
            w = tl.where(keep.trans(), w, 0.0)
        thin_tile = thin_ptr + rows[:, None] * stride_tm + thin_columns[None, :] * stride_tr
        t = tl.load(thin_tile, mask=row_ok[:, None] & thin_ok[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        acc = tl.dot(w, t, acc, input_precision=PRECISION)  # (BLOCK_D, BLOCK_R) fp32
    tile = partial_ptr + split.to(tl.int64) * stride_ps + places[None, :] * stride_pr + columns[:, None]
    tl.store(tile, acc, mask=column_ok[:, None] & place_ok[None, :])


@triton.jit
def reduce_gradient_kernel(
    partial_ptr,
    index_ptr,
    out_ptr,
    D,
    splits,
    scale,
    stride_ps,
    stride_pr,
    stride_or,
    stride_od,
    BLOCK_D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BY_MODULE: tl.constexpr,
):
    """Add the splits in order, scale, round once and store at the module's own row: out[module(r), d].

    partial (splits, R, D) fp32 with a row per place, or per module if BY_MODULE; out addressed by (module, d); a place
    whose index is −1 stores nothing.
    """
    place = tl.program_id(1).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # (BLOCK_D,)
    ok = columns < D
    module = place
    if HAS_INDEX:
        module = tl.load(index_ptr + place).to(tl.int64)
    if module >= 0:
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        row = module if BY_MODULE else place
        tile = partial_ptr + row * stride_pr + columns
        for _ in range(splits):
            acc += tl.load(tile, mask=ok, other=0.0)  # (BLOCK_D,) fp32
            tile += stride_ps
        out_tile = out_ptr + module * stride_or + columns * stride_od
        tl.store(out_tile, (acc * scale).to(out_ptr.dtype.element_ty), mask=ok)


def factor_gradient_(
    out: Tensor,
    thin: Tensor,
    wide: Tensor,
    *,
    thin_index: Tensor | None,
    out_index: Tensor | None,
    scale: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """Write s·thinᵀ·D(wide) into the rows of `out` (R, D) and return it.

    Args:
        out: (R, D), any strides; rows that `out_index` does not name are left as they are.
        thin: (M, ·), the side product; `thin_index` names the columns to use, None takes all in order.
        wide: (M, D).
        out_index: int32, the row of `out` for every place; −1 stores nothing; None stores in order.
        dropout: D, of the elements of `wide`; None keeps all.
    """
    (rows, d), index = wide.shape, thin_index if thin_index is not None else out_index
    width = thin.shape[1] if index is None else index.shape[0]
    if width == 0 or d == 0:
        return out
    shape = ShapeClass("factor_gradient", dtype_name(wide.dtype), rows, d, width, width)
    blocks = find_blocks(GradientBlocks, shape, wide.device, is_aligned(wide))
    if dropout is not None and wide.dtype.itemsize >= 4:  # the mask takes registers that fp32 tiles do not leave
        blocks = replace(blocks, block_d=min(blocks.block_d, 64))
    splits = max(1, min(blocks.splits, cdiv(rows, blocks.block_m)))
    # Whole blocks a split, so that no row block straddles two of them.
    split_rows = cdiv(cdiv(rows, splits), blocks.block_m) * blocks.block_m
    partial = torch.empty((splits, width, d), dtype=torch.float32, device=wide.device)
    grid = (cdiv(d, blocks.block_d), cdiv(width, blocks.block_r), splits)
    with torch.cuda.device_of(wide):
        partial_gradient_kernel[grid](
            thin,
            wide,
            thin_index if thin_index is not None else wide,
            dropout.seed if dropout is not None else wide,
            partial,
            rows,
            d,
            width,
            split_rows,
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
            PRECISION=dot_precision(wide.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    keep_scale = 1 / (1 - dropout.p) if dropout is not None else 1.0
    reduce_partials_(out, partial, index=out_index, by_module=False, scale=scale * keep_scale)
    return out


def reduce_partials_(out: Tensor, partial: Tensor, *, index: Tensor | None, by_module: bool, scale: float) -> None:
    """Add partial (splits, R, D) fp32 over its splits into out (R, D), scaled and rounded once, any strides.

    With an index, place t goes to row index[t] of out and −1 nowhere; it is read from row t of `partial`, or from row
    index[t] if `by_module`.
    """
    splits, width, d = partial.shape
    places = width if index is None else index.shape[0]
    if places == 0:
        return
    with torch.cuda.device_of(out):
        reduce_gradient_kernel[(cdiv(d, 1024), places)](
            partial,
            index if index is not None else out,
            out,
            d,
            splits,
            scale,
            partial.stride(0),
            partial.stride(1),
            *out.stride(),
            BLOCK_D=1024,
            HAS_INDEX=index is not None,
            BY_MODULE=by_module,
            num_warps=4,
        )
