"""dS and dB from one read of dY, deterministically.

    dS = dY B          (M, R)      partial sums over chunks of N
    dB = s·dYᵀ S       (N, R)      partial sums over splits of the rows

S = D(x) Aᵀ is the side product of the forward, dS that of the backward (`side_product.py`).

A program takes one chunk of dY's columns and one split of its rows. Over its blocks of rows it accumulates dB and
stores partial sums of dS. If there are several partial sums, they are fp32, and a second launch for each gradient adds
them in order. If writing and reading the partial sums of dS moves more bytes than a second read of dY, dY is read
twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.device_functions import load_modules
from plora_kernels.kernels.factor_gradient import factor_gradient_, reduce_partials_, store_sum
from plora_kernels.kernels.launch import (
    cdiv,
    constants,
    dot_precision,
    dtype_name,
    has_wide_factors,
    is_aligned,
    strides,
)
from plora_kernels.kernels.replay import empty, launch, zeros
from plora_kernels.kernels.side_product import side_product
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import OutputGradientBlocks, ShapeClass, row_splits
from plora_kernels.tuning.lookup import find_blocks


@triton.jit
def output_gradient_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    index_ptr,
    out_index_ptr,
    ds_ptr,
    db_ptr,
    M,
    N,
    R,
    split_rows,
    scale,
    stride_ym,
    stride_yn,
    stride_bn,
    stride_br,
    stride_sm,
    stride_sr,
    stride_dsc,
    stride_dsm,
    stride_dbs,
    stride_dbr,
    stride_dbn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store ds[chunk] (M, R) = dY[:, chunk] B[chunk] for the split's rows and db[split] (R, chunk) = (dYᵀ S)ᵀ.

    dy (M, N), b (N, ·), s (M, R), index (R,) int32 or None, ds (chunks, M, R) and db (splits, R, N) fp32. R is the
    number of columns of s; columns without a module hold zeros. If there is one chunk, ds is dS in the dtype of dy. If
    WHOLE, there is one split, and db is dBᵀ itself: see `store_sum`, with out_index (R,).
    """
    chunk, r0, split = tl.program_id(0), tl.program_id(1) * BLOCK_R, tl.program_id(2)
    columns = (chunk * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # (BLOCK_N,)
    places = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)  # (BLOCK_R,)
    column_ok, place_ok = columns < N, places < R
    modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, tl.int64)
    b_tile = b_ptr + columns[:, None] * stride_bn + modules[None, :] * stride_br
    b = tl.load(b_tile, mask=column_ok[:, None] & module_ok[None, :], other=0.0)
    b = b.to(dy_ptr.dtype.element_ty)  # (BLOCK_N, BLOCK_R)

    first = split.to(tl.int64) * split_rows
    last = tl.minimum(first + split_rows, M)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for m in range(0, split_rows, BLOCK_M):
        rows = first + m + tl.arange(0, BLOCK_M).to(tl.int64)  # (BLOCK_M,)
        row_ok = rows < last
        dy_tile = dy_ptr + rows[:, None] * stride_ym + columns[None, :] * stride_yn
        d = tl.load(dy_tile, mask=row_ok[:, None] & column_ok[None, :], other=0.0)  # (BLOCK_M, BLOCK_N)
        s_tile = s_ptr + rows[:, None] * stride_sm + places[None, :] * stride_sr
        s = tl.load(s_tile, mask=row_ok[:, None] & place_ok[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        db = tl.dot(tl.trans(d), s, db, input_precision=PRECISION)  # (BLOCK_N, BLOCK_R) fp32
        ds = tl.dot(d, b, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
        ds = tl.where(module_ok[None, :], ds, 0.0)  # columns without a module hold NaN where dY is infinite
        ds_tile = ds_ptr + chunk.to(tl.int64) * stride_dsc + rows[:, None] * stride_dsm + places[None, :]
        tl.store(ds_tile, ds.to(ds_ptr.dtype.element_ty), mask=row_ok[:, None] & place_ok[None, :])
    if not WHOLE:
        db_ptr += split.to(tl.int64) * stride_dbs
    store_sum(db_ptr, out_index_ptr, db, r0, R, columns, column_ok, scale, stride_dbr, stride_dbn, BLOCK_R, WHOLE)


def output_gradient_(
    d_lora_B: Tensor,
    dy: Tensor,
    lora_B: Tensor,
    s: Tensor,
    *,
    index: Tensor | None,
    out_index: Tensor | None,
    scale: float,
) -> Tensor:
    """Write dB = s·dYᵀ S into the columns of d_lora_B (N, R) and return dS (M, W) = dY B in dY's dtype.

    Args:
        d_lora_B: (N, R); columns that `out_index` does not name are not written.
        dy: (M, N). lora_B: (N, R).
        s: (M, W), the forward's side product.
        index: (W,) int32, the modules of the columns of s, −1 for none; None: all modules in order.
        out_index: int32, the modules whose gradient is wanted: `index`, or a subset of all modules if that is None.
    """
    (rows, n), width = dy.shape, s.shape[1]
    if rows * width * n == 0:
        return zeros((rows, width), dy.dtype, dy.device)
    shape = ShapeClass("output_gradient", dtype_name(dy.dtype), rows, n, width, width)
    wide = has_wide_factors(dy, lora_B)
    blocks = find_blocks(OutputGradientBlocks, shape, dy.device, is_aligned(dy), wide_factors=wide)
    chunks = cdiv(n, blocks.block_n)
    # Bytes per row and chunk: writing and reading fp32 partial sums of dS, against reading dY a second time.
    if 2 * 4 * width > dy.element_size() * blocks.block_n:
        thin_index = out_index if index is None else None
        factor_gradient_(d_lora_B.t(), s, dy, thin_index=thin_index, out_index=out_index, scale=scale)
        return side_product(dy, lora_B, index=index, dropout=None)
    tiles_r, multiprocessors = cdiv(width, blocks.block_r), lookup.multiprocessors_of(dy.device)
    splits = row_splits(rows, width, chunks * tiles_r, blocks.block_m, blocks.waves, multiprocessors)
    # A split is a whole number of row blocks, so that no block lies in two splits.
    split_rows = cdiv(cdiv(rows, splits), blocks.block_m) * blocks.block_m
    gradient, by_module = d_lora_B.t(), index is None and out_index is not None
    whole = splits == 1 and not by_module
    ds = empty((rows, width), dy.dtype, dy.device)
    ds_parts = ds[None] if chunks == 1 else empty((chunks, rows, width), torch.float32, dy.device)
    db_parts = gradient if whole else empty((splits, width, n), torch.float32, dy.device)
    with torch.cuda.device_of(dy):
        launch(
            output_gradient_kernel,
            (chunks, tiles_r, splits),
            *(dy, lora_B, s, index, out_index, ds_parts, db_parts),
            *(rows, n, width, split_rows),
            scale,
            *strides(dy, lora_B, s),
            *ds_parts.stride()[:2],
            *((0, *db_parts.stride()) if whole else db_parts.stride()),
            **constants(blocks),
            WHOLE=whole,
            PRECISION=dot_precision(dy.dtype),
        )
    if not whole:
        reduce_partials_(gradient, db_parts, index=out_index, by_module=by_module, scale=scale)
    if chunks > 1:
        parts = ds_parts.view(chunks, 1, -1)
        reduce_partials_(ds.view(1, -1), parts, index=None, by_module=False, scale=1.0)
    return ds
