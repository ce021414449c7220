"""The adapted matmul of groups of rows: out_g = in_g · main + bias + s_g·((in_g · down_g) ⊙ m_g) · up_g.

This is `adapted_matmul` for groups, for the forward and dX; in · down is the side product (`side_product.py`). All rows
of a tile belong to one group, and the tile loads that group's modules only. Rows are not padded: the tile at the end of
a group is masked.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.device_functions import (
    add_low_rank,
    keep_mask,
    load_modules,
    load_side,
    multiply,
    store_side,
    tile_position,
)
from plora_kernels.kernels.grouped_tiles import Groups, grouped_tiles, load_tile, row_numbers
from plora_kernels.kernels.launch import Dropout, DropoutArguments, cdiv, dot_precision, layer_class, needs_wide_offsets
from plora_kernels.kernels.replay import empty, launch
from plora_kernels.kernels.side_product import side_product
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import MatmulBlocks, tile
from plora_kernels.tuning.defaults import pointer_blocks
from plora_kernels.tuning.lookup import find_blocks

# The largest tile, in elements, if dropout masks the low-rank part of out: that part has a second accumulator, in
# registers or tensor memory. With a tile twice as large sm_90 spills, and for sm_100 Triton 3.9 compiles a kernel that
# does nothing.
MASKED_TILE = 128 * 128


@triton.jit
def grouped_matmul_kernel(
    in_ptr,
    main_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    index_ptr,
    table_ptr,
    scales_ptr,
    out_ptr,
    side_ptr,
    seed_ptr,
    numbers_ptr,
    selected_ptr,
    selected_width,
    drop_threshold,
    keep_scale,
    T,
    D_IN,
    D_OUT,
    R,
    scale,
    stride_im,
    stride_id,
    stride_wd,
    stride_wo,
    stride_dg,
    stride_dd,
    stride_dr,
    stride_ug,
    stride_ur,
    stride_uo,
    stride_om,
    stride_oo,
    stride_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
    SIDE_GIVEN: tl.constexpr,
    STORE_SIDE: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of out, at most BLOCK_M rows of one group by BLOCK_N columns.

    in (M, D_IN), main (D_IN, D_OUT), down (C, D_IN, ·), up (C, ·, D_OUT), bias (D_OUT,), index (C, R) int32 or None,
    table (T, 4) as `grouped_tiles` makes it, scales (C,) fp32 or None, seed (C,), numbers (M,), the rows' numbers in
    their group's mask, or None, selected (C, selected_width), out (M, D_OUT), side (M, R): loaded if SIDE_GIVEN,
    else computed along with the tile, which needs R ≤ BLOCK_R. All else is as in `tile_matmul_kernel`.
    """
    pid_m, pid_n = tile_position(tl.program_id(0), T, tl.cdiv(D_OUT, BLOCK_N), GROUP_M)
    group, first, end, number = load_tile(table_ptr, pid_m)
    if group >= 0:
        offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
        rows = tl.arange(0, BLOCK_M).to(offset_type)  # (BLOCK_M,)
        columns = tl.arange(0, BLOCK_N).to(offset_type)  # (BLOCK_N,)
        depth = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
        row_ok, column_ok = rows < end - first, columns < D_OUT - pid_n * BLOCK_N
        first_row, first_column = first.to(tl.int64), (pid_n * BLOCK_N).to(tl.int64)
        if index_ptr is not None:
            index_ptr += group * R
        modules, module_ok = load_modules(index_ptr, 0, R, BLOCK_R, offset_type)

        acc, side = multiply(
            in_ptr + first_row * stride_im,
            main_ptr + first_column * stride_wo,
            down_ptr + group.to(tl.int64) * stride_dg,
            rows, columns, depth, modules, row_ok, column_ok, module_ok,
            D_IN, stride_im, stride_id, stride_wd, stride_wo, stride_dd, stride_dr,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, SIDE_GIVEN, PRECISION,
        )  # fmt: skip
        dtype = in_ptr.dtype.element_ty
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + group)
        up_base = up_ptr + group.to(tl.int64) * stride_ug + first_column * stride_uo
        side_base = side_ptr + first_row * stride_sm
        if selected_ptr is not None:
            selected_ptr += group * selected_width
        low = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if SIDE_GIVEN:
            for r0 in range(0, R, BLOCK_R):
                modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, offset_type)
                side = load_side(side_base, rows, row_ok, r0, R, stride_sm, BLOCK_R)
                up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
                u = tl.load(up_base + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)
                acc, low = add_low_rank(
                    acc, low, side, u, modules, scale, keep_scale, selected_ptr, selected_width,
                    dtype, seed_ptr is not None, SELECTED_BLOCK, PRECISION,
                )  # fmt: skip
        else:
            side = tl.where(module_ok[None, :], side, 0.0)  # columns without a module hold NaN where `in` is infinite
            up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
            u = tl.load(up_base + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)
            acc, low = add_low_rank(
                acc, low, side, u, modules, scale, keep_scale, selected_ptr, selected_width,
                dtype, seed_ptr is not None, SELECTED_BLOCK, PRECISION,
            )  # fmt: skip
            if STORE_SIDE:  # a constexpr, in its own `if`: Triton does not mix it with a run-time condition
                if pid_n == 0:
                    store_side(side_base, side.to(dtype), rows, row_ok, 0, R, stride_sm, BLOCK_R)

        if seed_ptr is not None:
            numbers = row_numbers(numbers_ptr, first, number, row_ok, BLOCK_M)
            keep = keep_mask(seed_ptr + group, numbers, pid_n * BLOCK_N, drop_threshold, BLOCK_N)
            acc += tl.where(keep, low, 0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + pid_n * BLOCK_N + tl.arange(0, BLOCK_N), mask=column_ok, other=0.0)  # (BLOCK_N,)
            acc += bias.to(tl.float32)[None, :]
        out_base = out_ptr + first_row * stride_om + first_column * stride_oo
        out_offsets = rows[:, None] * stride_om + columns[None, :] * stride_oo
        tl.store(out_base + out_offsets, acc.to(dtype), mask=row_ok[:, None] & column_ok[None, :])


def find_grouped_blocks(
    op: str, inputs: Tensor, main: Tensor, groups: Groups, width: int, drop_out: Dropout | None
) -> MatmulBlocks:
    """Return blocks for out = inputs · main with `width` side columns, with pointer loads and block_m of a mean group.

    They are looked up for the rows of all groups together, because all groups share the launch that fills the device.
    `op` is "forward" or "input_gradient". Blocks measured for a design other than "tile" are replaced by the default.
    """
    shape, aligned = layer_class(op, inputs, main, width)
    blocks = find_blocks(MatmulBlocks, shape, inputs.device, aligned)
    if blocks.design != "tile":
        blocks = pointer_blocks(shape, lookup.hardware_of(inputs.device), aligned)
    block_m, block_n = tile(shape.m // max(1, groups.total), blocks.block_m), blocks.block_n
    warps, stages = blocks.num_warps, blocks.num_stages
    if inputs.dtype is torch.float32:
        # The group arguments take a few more registers, so a third stage would spill.
        stages = min(stages, 2)
        if drop_out is not None and drop_out.numbers is not None:
            block_n = min(block_n, 32)  # loading the rows' numbers takes a register, and a wider tile would spill
    elif aligned and block_m * block_n < 128 * 128:
        warps = 4
    if drop_out is not None:
        block_n = min(block_n, MASKED_TILE // block_m)
    return replace(blocks, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages)


def grouped_matmul(
    inputs: Tensor,
    main: Tensor,
    down: Tensor,
    up: Tensor,
    groups: Groups,
    *,
    op: str,
    bias: Tensor | None,
    index: Tensor | None,
    drop_in: Dropout | None,
    drop_out: Dropout | None,
    keep_side: bool,
) -> tuple[Tensor, Tensor]:
    """Return `(out, side)`: out (M, D_OUT) and side (M, W or R).

    side has no elements, unless `keep_side` is set or a launch of its own computed it. Shapes: inputs (M, D_IN), main
    (D_IN, D_OUT), down (C, D_IN, R), up (C, R, D_OUT), any strides; index (C, W) int32 or None. `drop_in` drops
    elements of `inputs` for the side product, `drop_out` elements of the low-rank part of out.
    """
    (rows, d_in), d_out = inputs.shape, main.shape[1]
    width = down.shape[2] if index is None else index.shape[1]
    out = empty((rows, d_out), inputs.dtype, inputs.device)
    blocks = find_grouped_blocks(op, inputs, main, groups, width, drop_out)
    # The side product is computed first if otherwise every tile would load `inputs` again, for a second block of
    # modules, or hash the dropout mask again.
    given = drop_in is not None or width > blocks.block_r
    if given:
        side = side_product(inputs, down, index=index, dropout=drop_in, groups=groups)
    else:
        side = empty((rows, width) if keep_side else (0,), inputs.dtype, inputs.device)
    if out.numel() == 0:
        return out, side
    table = grouped_tiles(groups.offsets, rows, blocks.block_m)
    dropped = DropoutArguments.of(drop_out)
    with torch.cuda.device_of(inputs):
        launch(
            grouped_matmul_kernel,
            (table.shape[0] * cdiv(d_out, blocks.block_n),),
            inputs,
            main,
            down,
            up,
            None if bias is None else bias.contiguous(),
            index,
            table,
            groups.scales,
            out,
            side,
            *dropped,
            table.shape[0],
            d_in,
            d_out,
            width,
            groups.scale,
            *inputs.stride(),
            *main.stride(),
            *down.stride(),
            *up.stride(),
            *out.stride(),
            width,
            BLOCK_M=blocks.block_m,
            BLOCK_N=blocks.block_n,
            BLOCK_K=blocks.block_k,
            BLOCK_R=blocks.block_r,
            GROUP_M=blocks.group_m,
            SELECTED_BLOCK=dropped.selected_block,
            SIDE_GIVEN=given,
            STORE_SIDE=keep_side and not given,
            WIDE_OFFSETS=needs_wide_offsets(256, inputs, main, down[0], up[0], out),
            PRECISION=dot_precision(inputs.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return out, side
