"""The adapted matmul with one program per output tile and pointer loads: any shape, any strides, any device.

`adapted_matmul` explains the computation, `grouped_matmul` that of groups, `side_product` the side product in · down.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.device_functions import (
    add_scaled_product,
    load_modules,
    load_side,
    masked_low_rank,
    multiply,
    store_side,
    tile_position,
)
from plora_kernels.kernels.grouped_tiles import Groups, grouped_tiles, load_tile, row_numbers
from plora_kernels.kernels.launch import (
    Dropout,
    DropoutArguments,
    cdiv,
    constants,
    dot_precision,
    needs_wide_offsets,
    strides,
)
from plora_kernels.kernels.replay import launch
from plora_kernels.tuning.blocks import MatmulBlocks


@triton.jit
def tile_matmul_kernel(
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
    M,
    D_IN,
    D_OUT,
    R,
    scale,
    stride_wg,
    stride_dg,
    stride_ug,
    stride_im,
    stride_id,
    stride_wd,
    stride_wo,
    stride_dd,
    stride_dr,
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
    """Compute one (BLOCK_M, BLOCK_N) tile of out; with STORE_SIDE the programs of the first column store in · down.

    in (M, D_IN), main (D_IN, D_OUT), down (D_IN, R), up (R, D_OUT), bias (D_OUT,), index (R,) int32 or None,
    out (M, D_OUT), side (M, R) = in · down in the dtype of `in`: loaded if SIDE_GIVEN, else computed along with the
    tile. R is the number of columns of side: modules, or entries of the index. Dropout, if there is a seed, masks the
    low-rank part of out, for the modules that `selected` names or, if SELECTED_BLOCK is 0, for all; the side product
    must be given then. Sums run in fp32; the side product is rounded to the inputs' dtype before it is multiplied by
    `up`.

    For groups of rows M is the number of rows of table (M, 4), which `grouped_tiles` makes, and a tile holds rows of
    one group. down, up, index, seed and selected have a leading axis (C,), and so have main and bias if there is a
    stride_wg; scales (C,) fp32, and numbers, the rows' numbers in their group's mask, may be None. A side product that
    is not given needs R ≤ BLOCK_R.
    """
    tiles_m = tl.cdiv(M, BLOCK_M) if table_ptr is None else M
    pid_m, pid_n = tile_position(tl.program_id(0), tiles_m, tl.cdiv(D_OUT, BLOCK_N), GROUP_M)
    first, end, number = pid_m * BLOCK_M, M, pid_m * BLOCK_M
    if table_ptr is not None:
        group, first, end, number = load_tile(table_ptr, pid_m)
        if group < 0:
            return
        down_ptr += group.to(tl.int64) * stride_dg
        if stride_wg is not None:
            main_ptr += group.to(tl.int64) * stride_wg
        if index_ptr is not None:
            index_ptr += group * R
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + group)
        if seed_ptr is not None:
            seed_ptr += group
        if selected_ptr is not None:
            selected_ptr += group * selected_width

    # A tile's base is a 64-bit scalar, since M·D_IN may exceed 2³¹. Offsets inside a tile take 32 bits, which halves
    # their registers, unless the strides are so large that even these offsets would overflow (WIDE_OFFSETS).
    offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
    rows = tl.arange(0, BLOCK_M).to(offset_type)  # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_N).to(offset_type)  # (BLOCK_N,)
    depth = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
    row_ok, column_ok = rows < end - first, columns < D_OUT - pid_n * BLOCK_N
    first_row, first_column = first.to(tl.int64), (pid_n * BLOCK_N).to(tl.int64)
    modules, module_ok = load_modules(index_ptr, 0, R, BLOCK_R, offset_type)
    dtype = in_ptr.dtype.element_ty
    side_base = side_ptr + first_row * stride_sm

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if seed_ptr is not None:
        up_base = up_ptr + first_column * stride_uo
        if table_ptr is not None:
            up_base += group.to(tl.int64) * stride_ug
        acc = masked_low_rank(
            side_base, up_base, index_ptr, seed_ptr, selected_ptr, selected_width,
            row_numbers(numbers_ptr, first, number, row_ok, BLOCK_M),
            rows, columns, row_ok, column_ok, pid_n * BLOCK_N, R, R, scale, keep_scale, drop_threshold,
            stride_ur, stride_uo, stride_sm,
            BLOCK_M, BLOCK_N, BLOCK_R, SELECTED_BLOCK, offset_type, dtype, PRECISION,
        )  # fmt: skip
    acc, side = multiply(
        acc,
        in_ptr + first_row * stride_im,
        main_ptr + first_column * stride_wo,
        down_ptr,
        rows, columns, depth, modules, row_ok, column_ok, module_ok,
        D_IN, stride_im, stride_id, stride_wd, stride_wo, stride_dd, stride_dr,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, SIDE_GIVEN, PRECISION,
    )  # fmt: skip
    if table_ptr is not None:  # only here, so that the K loop need not hold the pointer in registers
        up_ptr += group.to(tl.int64) * stride_ug
    up_base = up_ptr + first_column * stride_uo
    if not SIDE_GIVEN:
        side = tl.where(module_ok[None, :], side, 0.0)  # columns without a module hold NaN where `in` is infinite
        up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
        u = tl.load(up_base + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
        acc = add_scaled_product(side, u, acc, scale, dtype, PRECISION)  # (BLOCK_M, BLOCK_N) fp32
        if STORE_SIDE:  # a constexpr, in its own `if`: Triton does not mix it with a run-time condition
            if pid_n == 0:
                store_side(side_base, side.to(dtype), rows, row_ok, 0, R, stride_sm, BLOCK_R)
    if seed_ptr is None and (SIDE_GIVEN or table_ptr is None):
        for r0 in range(0 if SIDE_GIVEN else BLOCK_R, R, BLOCK_R):
            modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, offset_type)
            if SIDE_GIVEN:
                side = load_side(side_base, rows, row_ok, r0, R, stride_sm, BLOCK_R)
            else:
                # For further blocks of modules `in` is loaded again: registers hold only BLOCK_R columns of side.
                in_start, down_start = first_row * stride_im, tl.full((), 0, tl.int64)  # offsets, as in `multiply`
                in_offsets = rows[:, None] * stride_im + depth[None, :] * stride_id
                in_step = tl.full((), BLOCK_K, tl.int64) * stride_id
                down_step = tl.full((), BLOCK_K, tl.int64) * stride_dd
                down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
                side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
                for k in range(0, D_IN, BLOCK_K):
                    depth_ok = depth < D_IN - k
                    a = tl.load(in_ptr + in_start + in_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0)
                    d = tl.load(
                        down_ptr + down_start + down_offsets, mask=depth_ok[:, None] & module_ok[None, :], other=0.0
                    )
                    side = tl.dot(a, d.to(a.dtype), side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
                    in_start += in_step
                    down_start += down_step
                side = tl.where(module_ok[None, :], side, 0.0)
                if STORE_SIDE:
                    if pid_n == 0:
                        store_side(side_base, side.to(dtype), rows, row_ok, r0, R, stride_sm, BLOCK_R)
            up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
            u = tl.load(
                up_base + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0
            )  # (BLOCK_R, BLOCK_N)
            acc = add_scaled_product(side, u, acc, scale, dtype, PRECISION)  # (BLOCK_M, BLOCK_N) fp32
    if bias_ptr is not None:
        if stride_wg is not None:
            bias_ptr += group.to(tl.int64) * D_OUT
        bias = tl.load(bias_ptr + pid_n * BLOCK_N + tl.arange(0, BLOCK_N), mask=column_ok, other=0.0)  # (BLOCK_N,)
        acc += bias.to(tl.float32)[None, :]
    out_base = out_ptr + first_row * stride_om + first_column * stride_oo
    out_offsets = rows[:, None] * stride_om + columns[None, :] * stride_oo
    tl.store(out_base + out_offsets, acc.to(dtype), mask=row_ok[:, None] & column_ok[None, :])


def tile_matmul(
    out: Tensor,
    side: Tensor,
    inputs: Tensor,
    main: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    bias: Tensor | None,
    index: Tensor | None,
    dropout: Dropout | None,
    scale: float,
    side_given: bool,
    keep_side: bool,
    blocks: MatmulBlocks,
    groups: Groups | None = None,
) -> None:
    """Write out (M, D_OUT) and, if `keep_side`, the side product side (M, W).

    See `adapted_matmul` for the shapes; with groups, whose own scales then replace `scale`, see `grouped_matmul`.
    """
    (rows, d_in), d_out = inputs.shape, main.shape[-1]
    width = down.shape[-1] if index is None else index.shape[-1]
    table = None if groups is None else grouped_tiles(groups.offsets, rows, blocks.block_m)
    tiles_m = cdiv(rows, blocks.block_m) if table is None else table.shape[0]
    scales = None if groups is None else groups.scales
    bias = None if bias is None else bias.contiguous()
    one_main = main if main.dim() == 2 else main[0]
    one_down, one_up = (down, up) if groups is None else (down[0], up[0])
    dropped = DropoutArguments.of(dropout)
    with torch.cuda.device_of(inputs):
        launch(
            tile_matmul_kernel,
            (tiles_m * cdiv(d_out, blocks.block_n),),
            *(inputs, main, down, up, bias, index, table, scales, out, side),
            *dropped,
            *(rows if table is None else tiles_m, d_in, d_out, width),
            scale,
            None if main.dim() == 2 else main.stride(0),
            *((None, None) if groups is None else (down.stride(0), up.stride(0))),
            *strides(inputs, one_main, one_down, one_up, out),
            width,
            **constants(blocks),
            SELECTED_BLOCK=dropped.selected_block,
            SIDE_GIVEN=side_given,
            STORE_SIDE=keep_side and not side_given,
            WIDE_OFFSETS=needs_wide_offsets(256, inputs, one_main, one_down, one_up, out),
            PRECISION=dot_precision(inputs.dtype),
        )
