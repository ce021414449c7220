"""The side product: S = D(x) Aᵀ in the forward, dS = dY B in the backward, from one read of the large matrix.

It has one column per module, or per entry of an index buffer; entries −1 are columns without a module, which hold
zeros. Designs that start with the side product have this launch, and so has dropout in all of them: otherwise every
tile would hash the mask again, or, in dX, could not begin with the low-rank part, which the mask applies to. For groups
of rows a table gives each tile its group and rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.device_functions import are_selected, keep_mask, load_modules
from plora_kernels.kernels.grouped_tiles import Groups, grouped_tiles, load_tile, row_numbers
from plora_kernels.kernels.launch import (
    Dropout,
    DropoutArguments,
    cdiv,
    constants,
    dot_precision,
    dtype_name,
    has_wide_factors,
    is_aligned,
    launches_dependents,
    needs_wide_offsets,
    strides,
)
from plora_kernels.kernels.replay import empty, launch
from plora_kernels.tuning.blocks import ShapeClass, SideBlocks, beside_product, tile
from plora_kernels.tuning.lookup import find_blocks


@triton.jit
def side_product_kernel(
    in_ptr,
    down_ptr,
    index_ptr,
    table_ptr,
    side_ptr,
    seed_ptr,
    numbers_ptr,
    selected_ptr,
    selected_width,
    drop_threshold,
    keep_scale,
    M,
    D_IN,
    R,
    stride_dg,
    stride_im,
    stride_id,
    stride_dd,
    stride_dr,
    stride_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
    LAUNCHES_DEPENDENTS: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store BLOCK_M rows and BLOCK_R columns of side (M, R) = D(in) · down; R is the number of columns of side.

    in (M, D_IN), down (D_IN, ·) in the dtype of `in` or in fp32, index (R,) int32 or None. With a seed, D drops
    elements of `in` and scales the rest by keep_scale; if SELECTED_BLOCK is not 0, only for the modules that `selected`
    (selected_width,) names. With the table of `grouped_tiles` the tile is one of its rows; down, index, seed and
    selected have a leading axis (C,), and numbers (M,) may be None.
    """
    if LAUNCHES_DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
    r0 = tl.program_id(1) * BLOCK_R
    first, end, number = tl.program_id(0) * BLOCK_M, M, tl.program_id(0) * BLOCK_M
    if table_ptr is not None:
        group, first, end, number = load_tile(table_ptr, tl.program_id(0))
        if group < 0:
            return
        down_ptr += group.to(tl.int64) * stride_dg
        if index_ptr is not None:
            index_ptr += group * R
        if seed_ptr is not None:
            seed_ptr += group
        if selected_ptr is not None:
            selected_ptr += group * selected_width
    offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
    rows = tl.arange(0, BLOCK_M).to(offset_type)  # (BLOCK_M,)
    depth = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
    row_ok = rows < end - first
    first_row = first.to(tl.int64)
    modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, offset_type)

    in_base = in_ptr + first_row * stride_im
    in_start, down_start = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    in_offsets = rows[:, None] * stride_im + depth[None, :] * stride_id
    down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
    in_step = tl.full((), BLOCK_K, tl.int64) * stride_id
    down_step = tl.full((), BLOCK_K, tl.int64) * stride_dd
    side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    whole = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)  # side product without dropout
    if seed_ptr is not None:
        numbers = row_numbers(numbers_ptr, first_row, number, row_ok, BLOCK_M)  # (BLOCK_M,)
    for k in range(0, D_IN, BLOCK_K):
        depth_ok = depth < D_IN - k
        a = tl.load(
            in_base + in_start + in_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0
        )  # (BLOCK_M, BLOCK_K)
        d = tl.load(down_ptr + down_start + down_offsets, mask=depth_ok[:, None] & module_ok[None, :], other=0.0)
        d = d.to(a.dtype)  # (BLOCK_K, BLOCK_R)
        if seed_ptr is not None:
            if SELECTED_BLOCK > 0:
                whole = tl.dot(a, d, whole, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
            a = tl.where(keep_mask(seed_ptr, numbers, k, drop_threshold, BLOCK_K), a, 0.0)
        side = tl.dot(a, d, side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
        in_start += in_step
        down_start += down_step
    if seed_ptr is not None:
        side *= keep_scale
        if SELECTED_BLOCK > 0:
            side = tl.where(are_selected(selected_ptr, selected_width, modules, SELECTED_BLOCK)[None, :], side, whole)
    side = tl.where(module_ok[None, :], side, 0.0)  # columns without a module hold NaN where `in` is infinite
    places = r0 + tl.arange(0, BLOCK_R)
    side_tile = side_ptr + first_row * stride_sm + rows[:, None] * stride_sm + places[None, :]
    tl.store(side_tile, side.to(side_ptr.dtype.element_ty), mask=row_ok[:, None] & (places < R)[None, :])


def side_product(
    inputs: Tensor,
    down: Tensor,
    *,
    index: Tensor | None,
    dropout: Dropout | None,
    groups: Groups | None = None,
    leads: bool = False,
) -> Tensor:
    """Return side (M, W) = D(inputs) · down in the inputs' dtype; W is the length of the index, or R without one.

    Shapes: inputs (M, D_IN), down (D_IN, R) in the inputs' dtype or fp32, index (W,) int32 or None for all modules in
    order; columns whose index is −1 hold zeros. With groups, rows use their group's part of down (C, D_IN, R) and index
    (C, W), and dropout's seed is (C,), selected (C, ·). With `leads` the next launch may run beside this one
    (programmatic dependent launch), which leaves it room on the multiprocessors.
    """
    (rows, d_in), width = inputs.shape, down.shape[-1] if index is None else index.shape[-1]
    side = empty((rows, width), inputs.dtype, inputs.device)
    if side.numel() == 0:
        return side
    shape = ShapeClass("side_product", dtype_name(inputs.dtype), rows, d_in, width, width)
    wide = has_wide_factors(inputs, down)
    blocks = find_blocks(SideBlocks, shape, inputs.device, is_aligned(inputs), wide_factors=wide)
    leads = leads and launches_dependents(inputs.device)
    if leads:
        blocks = beside_product(blocks, shape.dtype, wide_factors=wide)
    # Tiles have no more rows than an average group, rounded up to a power of two.
    if groups is not None:
        blocks = replace(blocks, block_m=tile(rows // max(1, groups.total), blocks.block_m))
    dropped = DropoutArguments.of(dropout)
    if wide and dropped.selected_block > 64:
        # To find modules in a long index takes registers beside the two sums, and with fp32 numbers it would spill.
        blocks = replace(blocks, block_r=min(blocks.block_r, 32))
    table = None if groups is None else grouped_tiles(groups.offsets, rows, blocks.block_m)
    tiles = cdiv(rows, blocks.block_m) if table is None else table.shape[0]
    one = down if groups is None else down[0]
    with torch.cuda.device_of(inputs):
        launch(
            side_product_kernel,
            (tiles, cdiv(width, blocks.block_r)),
            *(inputs, down, index, table, side),
            *dropped,
            *(rows, d_in, width),
            None if groups is None else down.stride(0),
            *strides(inputs, one),
            width,
            **constants(blocks),
            SELECTED_BLOCK=dropped.selected_block,
            LAUNCHES_DEPENDENTS=leads,
            WIDE_OFFSETS=needs_wide_offsets(256, inputs, one),
            PRECISION=dot_precision(inputs.dtype),
            shares_multiprocessors=leads,
        )
    return side
