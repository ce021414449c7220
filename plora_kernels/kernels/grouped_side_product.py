"""The side product of every group by its own modules: S_g = D(x_g) A_gᵀ, or dS_g = dY_g B_g; one read of x or dY."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import ShapeClass, SideBlocks
from ..configs import find_blocks
from ..dropout import threshold
from .grouped_tiles import Groups, grouped_tiles, load_tile, row_numbers
from .launch import Dropout, dot_precision, dtype_name, is_aligned, needs_wide_offsets
from .modules import are_selected, keep_mask, load_modules


@triton.jit
def grouped_side_product_kernel(
    in_ptr,
    down_ptr,
    index_ptr,
    table_ptr,
    seed_ptr,
    numbers_ptr,
    selected_ptr,
    side_ptr,
    D_IN,
    R,
    selected_width,
    drop_threshold,
    keep_scale,
    stride_im,
    stride_id,
    stride_dg,
    stride_dd,
    stride_dr,
    stride_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    DROPOUT: tl.constexpr,
    NUMBERED: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store side = D(in) · down[group] for the rows of one tile and BLOCK_R places; R counts places.

    in (M, D_IN), down (C, D_IN, ·), index (C, R) int32 or unused, table as `grouped_tiles` makes it, seed (C,),
    numbers (M,) or unused unless NUMBERED, selected (C, selected_width) or unused if SELECTED_BLOCK is 0, side (M, R).
    """
    r0 = tl.program_id(1) * BLOCK_R
    group, first, end, number = load_tile(table_ptr, tl.program_id(0))
    if group >= 0:
        offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
        rows = tl.arange(0, BLOCK_M).to(offset_type)  # (BLOCK_M,)
        depth = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
        row_ok = rows < end - first
        modules, module_ok = load_modules(index_ptr + group * R, r0, R, BLOCK_R, HAS_INDEX, offset_type)

        in_base = in_ptr + first.to(tl.int64) * stride_im
        down_base = down_ptr + group.to(tl.int64) * stride_dg
        in_offsets = rows[:, None] * stride_im + depth[None, :] * stride_id
        down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
        in_step = tl.full((), BLOCK_K, tl.int64) * stride_id
        down_step = tl.full((), BLOCK_K, tl.int64) * stride_dd
        side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        whole = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)  # of rows nothing is dropped from
        if DROPOUT:
            numbers = row_numbers(numbers_ptr + first, number, row_ok, BLOCK_M, NUMBERED)  # (BLOCK_M,)
        for k in range(0, D_IN, BLOCK_K):
            depth_ok = depth < D_IN - k
            a = tl.load(in_base + in_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
            d = tl.load(down_base + down_offsets, mask=depth_ok[:, None] & module_ok[None, :], other=0.0)
            if DROPOUT:
                if SELECTED_BLOCK > 0:
                    whole = tl.dot(a, d, whole, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
                a = tl.where(keep_mask(seed_ptr + group, numbers, k, drop_threshold, BLOCK_K), a, 0.0)
            side = tl.dot(a, d, side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
            in_base += in_step
            down_base += down_step
        if DROPOUT:
            side *= keep_scale
            if SELECTED_BLOCK > 0:
                chosen = are_selected(selected_ptr + group * selected_width, selected_width, modules, SELECTED_BLOCK)
                side = tl.where(chosen[None, :], side, whole)
        side = tl.where(module_ok[None, :], side, 0.0)  # 0 · infinity at places without a module
        places = r0 + tl.arange(0, BLOCK_R)
        side_tile = side_ptr + first.to(tl.int64) * stride_sm + rows[:, None] * stride_sm + places[None, :]
        tl.store(side_tile, side.to(side_ptr.dtype.element_ty), mask=row_ok[:, None] & (places < R)[None, :])


def grouped_side_product(
    inputs: Tensor, down: Tensor, groups: Groups, *, index: Tensor | None, dropout: Dropout | None
) -> Tensor:
    """Return side (M, places) = D(inputs) · down[group of the row]; zero at places whose index is −1.

    Shapes: inputs (M, D_IN), down (C, D_IN, R), index (C, places) int32 or None; dropout's seed (C,), selected (C, ·).
    """
    (rows, d_in), width = inputs.shape, down.shape[2] if index is None else index.shape[1]
    side = torch.empty((rows, width), dtype=inputs.dtype, device=inputs.device)
    if side.numel() == 0:
        return side
    shape = ShapeClass("side_product", dtype_name(inputs.dtype), max(1, rows // groups.total), d_in, width, width)
    blocks = find_blocks(SideBlocks, shape, inputs.device, is_aligned(inputs))
    table = grouped_tiles(groups.offsets, rows, blocks.block_m)
    selected = dropout.selected if dropout is not None else None
    with torch.cuda.device_of(inputs):
        grouped_side_product_kernel[(table.shape[0], triton.cdiv(width, blocks.block_r))](
            inputs,
            down,
            index if index is not None else table,
            table,
            dropout.seed if dropout is not None else table,
            dropout.numbers if dropout is not None and dropout.numbers is not None else table,
            selected if selected is not None else table,
            side,
            d_in,
            width,
            dropout.selected_width if dropout is not None else 0,
            threshold(dropout.p) if dropout is not None else 0,
            1 / (1 - dropout.p) if dropout is not None else 1.0,
            *inputs.stride(),
            *down.stride(),
            width,
            BLOCK_M=blocks.block_m,
            BLOCK_K=blocks.block_k,
            BLOCK_R=blocks.block_r,
            SELECTED_BLOCK=dropout.selected_block if dropout is not None else 0,
            HAS_INDEX=index is not None,
            DROPOUT=dropout is not None,
            NUMBERED=dropout is not None and dropout.numbers is not None,
            WIDE_OFFSETS=needs_wide_offsets(256, inputs, down[0]),
            PRECISION=dot_precision(inputs.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return side
