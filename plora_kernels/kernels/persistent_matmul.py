"""The adapted matmul as a persistent kernel with tensor descriptors (TMA): aligned matrices, sm_90 and later.

Each program computes several output tiles in turn; the first loads of a tile start after the tile before is stored. The
side product (`side_product.py`) is recomputed in every tile, loaded from memory, or computed in the same launch, by
side tiles:

    A side tile is the side product of the rows of one row of output tiles. Programs take side tiles by an atomic ticket
    and publish each with a release flag, for which the output tiles of the same rows wait. In "one_launch" all programs
    take side tiles before any output tile. In "drawn" only those do that have one output tile fewer than the others,
    while the others compute their first one. A program that would wait for a flag first computes the side tiles that
    are not taken. Hence it only waits for a program that has started and that itself waits for no other, so launches
    that share the device cannot deadlock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plora_kernels.kernels.device_functions import (
    add_scaled_product,
    load_modules,
    load_side,
    masked_low_rank,
    store_side,
    tile_position,
)
from plora_kernels.kernels.launch import (
    Dropout,
    DropoutArguments,
    cdiv,
    constants,
    dot_precision,
    launches_dependents,
    needs_wide_offsets,
    strides,
)
from plora_kernels.kernels.replay import launch, zeros
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import SIDE_WITHIN, MatmulBlocks


@triton.jit
def _side_rows(
    in_desc,
    down_ptr,
    index_ptr,
    first_row,
    r0,
    D_IN,
    R,
    stride_dd,
    stride_dr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    offset_type: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return columns r0 … r0+BLOCK_R−1 of in · down for BLOCK_M rows: (BLOCK_M, BLOCK_R) fp32."""
    modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, offset_type)
    depth = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
    down_base = down_ptr
    down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
    down_step = tl.full((), BLOCK_K, tl.int64) * stride_dd
    side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, D_IN, BLOCK_K):
        a = in_desc.load([first_row, k])  # (BLOCK_M, BLOCK_K)
        d = tl.load(down_base + down_offsets, mask=(depth < D_IN - k)[:, None] & module_ok[None, :], other=0.0)
        side = tl.dot(a, d.to(a.dtype), side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
        down_base += down_step
    return tl.where(module_ok[None, :], side, 0.0)  # columns without a module hold NaN where `in` is infinite


@triton.jit
def _add_modules(
    acc,
    r0,
    in_desc,
    down_ptr,
    up_base,
    side_base,
    index_ptr,
    first_row,
    is_first_column,
    rows,
    columns,
    row_ok,
    column_ok,
    D_IN,
    R,
    scale,
    stride_dd,
    stride_dr,
    stride_ur,
    stride_uo,
    stride_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SIDE_STORED: tl.constexpr,
    STORE_SIDE: tl.constexpr,
    offset_type: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return acc + s · side · up for side columns r0 … r0+BLOCK_R−1, loaded if SIDE_STORED, else computed."""
    modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, offset_type)
    if SIDE_STORED:
        side = load_side(side_base, rows, row_ok, r0, R, stride_sm, BLOCK_R)
    else:
        # For further blocks of modules `in` is loaded again: registers hold only BLOCK_R columns of side.
        side = _side_rows(
            in_desc, down_ptr, index_ptr, first_row, r0, D_IN, R, stride_dd, stride_dr,
            BLOCK_M, BLOCK_K, BLOCK_R, offset_type, PRECISION,
        )  # fmt: skip
        if STORE_SIDE:
            if is_first_column:
                store_side(side_base, side.to(dtype), rows, row_ok, r0, R, stride_sm, BLOCK_R)
    up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
    u = tl.load(up_base + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
    return add_scaled_product(side, u, acc, scale, dtype, PRECISION)


@triton.jit
def _make_side_tile(
    in_desc,
    down_ptr,
    index_ptr,
    side_ptr,
    workspace_ptr,
    side_tile,
    rows,
    M,
    D_IN,
    R,
    stride_dd,
    stride_dr,
    stride_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    offset_type: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store in · down of the rows of one side tile, all columns, and set the tile's flag in the workspace."""
    side_base = side_ptr + (side_tile * BLOCK_M).to(tl.int64) * stride_sm
    for r0 in range(0, R, BLOCK_R):
        side = _side_rows(
            in_desc, down_ptr, index_ptr, side_tile * BLOCK_M, r0, D_IN, R, stride_dd, stride_dr,
            BLOCK_M, BLOCK_K, BLOCK_R, offset_type, PRECISION,
        )  # fmt: skip
        store_side(side_base, side.to(dtype), rows, rows < M - side_tile * BLOCK_M, r0, R, stride_sm, BLOCK_R)
    tl.debug_barrier()  # all threads must have stored before one of them publishes the tile
    tl.atomic_xchg(workspace_ptr + 1 + side_tile, 1, sem="release")


@triton.jit
def _wait_for_side(LAUNCHES_DEPENDENTS: tl.constexpr):
    """Wait for the launch that writes the side product; then let the next launch begin, if it is of this library."""
    tl.extra.cuda.gdc_wait()
    if LAUNCHES_DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def persistent_matmul_kernel(
    in_desc,
    main_desc,
    out_desc,
    down_ptr,
    up_ptr,
    bias_ptr,
    index_ptr,
    side_ptr,
    workspace_ptr,
    seed_ptr,
    selected_ptr,
    selected_width,
    drop_threshold,
    keep_scale,
    M,
    D_IN,
    D_OUT,
    R,
    drawing_from,
    scale,
    stride_dd,
    stride_dr,
    stride_ur,
    stride_uo,
    stride_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
    MAIN_TRANSPOSED: tl.constexpr,
    MODULE_BLOCKS: tl.constexpr,
    SIDE_GIVEN: tl.constexpr,
    SIDE_FIRST: tl.constexpr,
    STORE_SIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    LAUNCHES_DEPENDENTS: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute out (M, D_OUT) = in · main + bias + s·side · up, each program several (BLOCK_M, BLOCK_N) tiles in turn.

    in (M, D_IN), main (D_IN, D_OUT), given as its transpose (D_OUT, D_IN) if MAIN_TRANSPOSED, and out by descriptors;
    down (D_IN, R), up (R, D_OUT), bias (D_OUT,), index (R,) int32 or None, side (M, R). R is the number of columns of
    side, in MODULE_BLOCKS blocks. side is loaded if SIDE_GIVEN. If SIDE_FIRST, it is computed in this launch by side
    tiles: programs from number `drawing_from` on take these first, the others when they would wait for one. Otherwise
    every tile recomputes it, and the tiles of the first column store it if STORE_SIDE. workspace (1 + row tiles,) int32
    zeros: the next ticket, then a flag for every side tile. Dropout is that of `tile_matmul_kernel`, and needs side
    given.
    """
    offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
    dtype = in_desc.dtype
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(D_OUT, BLOCK_N)
    rows = tl.arange(0, BLOCK_M).to(offset_type)  # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_N).to(offset_type)  # (BLOCK_N,)
    depth = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
    down_step = tl.full((), BLOCK_K, tl.int64) * stride_dd

    ticket = tl.full((), 0, tl.int32)
    if SIDE_FIRST:
        if tl.program_id(0) >= drawing_from:
            ticket = tl.atomic_add(workspace_ptr, 1, sem="relaxed")
            while ticket < tiles_m:
                _make_side_tile(
                    in_desc, down_ptr, index_ptr, side_ptr, workspace_ptr, ticket, rows, M, D_IN, R,
                    stride_dd, stride_dr, stride_sm,
                    BLOCK_M, BLOCK_K, BLOCK_R, offset_type, dtype, PRECISION,
                )  # fmt: skip
                ticket = tl.atomic_add(workspace_ptr, 1, sem="relaxed")

    if LAUNCHES_DEPENDENTS and not DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        row_ok, column_ok = rows < M - pid_m * BLOCK_M, columns < D_OUT - pid_n * BLOCK_N
        modules, module_ok = load_modules(index_ptr, 0, R, BLOCK_R, offset_type)
        down_base = down_ptr
        down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
        side_base = side_ptr + (pid_m * BLOCK_M).to(tl.int64) * stride_sm
        up_base = up_ptr + (pid_n * BLOCK_N).to(tl.int64) * stride_uo
        up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
        up_ok = module_ok[:, None] & column_ok[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if seed_ptr is not None:
            if DEPENDENT:
                _wait_for_side(LAUNCHES_DEPENDENTS)
            # A loop of constant length takes fewer registers in this case and more, with spills, in all others.
            CONSTANT: tl.constexpr = MODULE_BLOCKS == 1 and SELECTED_BLOCK == 0
            acc = masked_low_rank(
                side_base, up_base, index_ptr, seed_ptr, selected_ptr, selected_width, pid_m * BLOCK_M + rows,
                rows, columns, row_ok, column_ok, pid_n * BLOCK_N,
                R, BLOCK_R if CONSTANT and up_ptr.dtype.element_ty == dtype else R,
                scale, keep_scale, drop_threshold, stride_ur, stride_uo, stride_sm,
                BLOCK_M, BLOCK_N, BLOCK_R, SELECTED_BLOCK, offset_type, dtype, PRECISION,
            )  # fmt: skip
        side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k in range(0, D_IN, BLOCK_K):
            a = in_desc.load([pid_m * BLOCK_M, k])  # (BLOCK_M, BLOCK_K)
            if MAIN_TRANSPOSED:  # noqa: SIM108
                w = main_desc.load([pid_n * BLOCK_N, k]).T  # (BLOCK_K, BLOCK_N)
            else:
                w = main_desc.load([k, pid_n * BLOCK_N])  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N) fp32
            if not SIDE_GIVEN and not SIDE_FIRST:
                d = tl.load(down_base + down_offsets, mask=(depth < D_IN - k)[:, None] & module_ok[None, :], other=0.0)
                side = tl.dot(a, d.to(a.dtype), side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
                down_base += down_step

        if seed_ptr is None:
            # If DEPENDENT, the launch that writes the side product may still run: until gdc_wait this one may neither
            # load the side product nor store anything.
            if DEPENDENT:
                _wait_for_side(LAUNCHES_DEPENDENTS)
            if SIDE_FIRST:
                while tl.atomic_add(workspace_ptr + 1 + pid_m, 0, sem="acquire") == 0:
                    # Compute side tiles that no program has taken, so that every awaited tile is being computed.
                    if ticket < tiles_m:
                        ticket = tl.atomic_add(workspace_ptr, 1, sem="relaxed")
                        if ticket < tiles_m:
                            _make_side_tile(
                                in_desc, down_ptr, index_ptr, side_ptr, workspace_ptr, ticket, rows, M, D_IN, R,
                                stride_dd, stride_dr, stride_sm,
                                BLOCK_M, BLOCK_K, BLOCK_R, offset_type, dtype, PRECISION,
                            )  # fmt: skip
            if not SIDE_GIVEN and not SIDE_FIRST:
                # Columns without a module hold NaN where `in` is infinite.
                side = tl.where(module_ok[None, :], side, 0.0)
                if STORE_SIDE:  # a constexpr, in its own `if`: Triton does not mix it with a run-time condition
                    if pid_n == 0:
                        store_side(side_base, side.to(dtype), rows, row_ok, 0, R, stride_sm, BLOCK_R)
            else:
                side = load_side(side_base, rows, row_ok, 0, R, stride_sm, BLOCK_R)
            u = tl.load(up_base + up_offsets, mask=up_ok, other=0.0)  # (BLOCK_R, BLOCK_N)
            acc = add_scaled_product(side, u, acc, scale, dtype, PRECISION)  # (BLOCK_M, BLOCK_N) fp32
            # The bounds are constant: one block compiles to no loop.
            for r0 in range(BLOCK_R, MODULE_BLOCKS * BLOCK_R, BLOCK_R):
                acc = _add_modules(
                    acc, r0, in_desc, down_ptr, up_base, side_base, index_ptr, pid_m * BLOCK_M, pid_n == 0,
                    rows, columns, row_ok, column_ok, D_IN, R, scale,
                    stride_dd, stride_dr, stride_ur, stride_uo, stride_sm,
                    BLOCK_M, BLOCK_K, BLOCK_R, SIDE_GIVEN or SIDE_FIRST, STORE_SIDE,
                    offset_type, dtype, PRECISION,
                )  # fmt: skip
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + pid_n * BLOCK_N + tl.arange(0, BLOCK_N), mask=column_ok, other=0.0)  # (BLOCK_N,)
            acc += bias.to(tl.float32)[None, :]
        # Stored in two halves: the staging buffer of a whole tile would take the shared memory of a pipeline stage.
        halves = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1)
        left, right = halves.split()  # (BLOCK_M, BLOCK_N // 2) fp32 each
        out_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], left.to(dtype))
        out_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N + BLOCK_N // 2], right.to(dtype))


def takes_descriptors(*matrices: Tensor) -> bool:
    """Say whether TMA can load these matrices: contiguous along an axis, 16-byte starts and strides, 32-bit sizes."""
    return all(
        1 in matrix.stride()
        and max(matrix.stride()) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and min(matrix.shape) > 0
        and max(matrix.shape) < 2**31
        for matrix in matrices
    )


def persistent_matmul(
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
) -> None:
    """Write out (M, D_OUT) and, if `keep_side` or the design needs it, side (M, W); see `adapted_matmul` for shapes.

    inputs and out must be row-major, main row- or column-major, and all must pass `takes_descriptors`. Dropout of the
    low-rank part of out needs the side product given.
    """
    (rows, d_in), d_out = inputs.shape, main.shape[1]
    width = down.shape[1] if index is None else index.shape[0]
    tiles_m, tiles_n = cdiv(rows, blocks.block_m), cdiv(d_out, blocks.block_n)
    programs = min(blocks.resident * lookup.multiprocessors_of(inputs.device), tiles_m * tiles_n)
    makes_side = blocks.design in SIDE_WITHIN and not side_given
    # A side product without columns had no launch, so this one would depend on some other kernel.
    dependent = blocks.dependent and side_given and width > 0 and launches_dependents(inputs.device)
    dropped = DropoutArguments.of(dropout)
    transposed = main.stride(1) != 1
    matrix = main.t() if transposed else main
    main_block = [blocks.block_n, blocks.block_k] if transposed else [blocks.block_k, blocks.block_n]
    with torch.cuda.device_of(inputs):
        launch(
            persistent_matmul_kernel,
            (programs,),
            TensorDescriptor(inputs, inputs.shape, inputs.stride(), [blocks.block_m, blocks.block_k]),
            TensorDescriptor(matrix, matrix.shape, matrix.stride(), main_block),
            TensorDescriptor(out, out.shape, out.stride(), [blocks.block_m, blocks.block_n // 2]),
            *(down, up, None if bias is None else bias.contiguous(), index, side),
            # Allocated for each launch: a buffer kept between launches could lie in the memory pool of a CUDA graph.
            zeros((1 + tiles_m,), torch.int32, inputs.device) if makes_side else None,
            *(dropped.seed, dropped.selected, dropped.selected_width, dropped.threshold, dropped.keep_scale),
            *(rows, d_in, d_out, width),
            # Programs from this number on have one tile fewer than the others; 0 if the last wave is full.
            tiles_m * tiles_n % programs if blocks.design == "drawn" else 0,
            scale,
            *strides(down, up),
            width,
            **constants(blocks),
            SELECTED_BLOCK=dropped.selected_block,
            MAIN_TRANSPOSED=transposed,
            MODULE_BLOCKS=cdiv(width, blocks.block_r),
            SIDE_GIVEN=side_given,
            SIDE_FIRST=makes_side,
            STORE_SIDE=keep_side and not side_given and not makes_side,
            DEPENDENT=dependent,
            LAUNCHES_DEPENDENTS=blocks.gradient_beside and side_given and launches_dependents(inputs.device),
            WIDE_OFFSETS=needs_wide_offsets(256, down, up),
            PRECISION=dot_precision(inputs.dtype),
            **({"launch_pdl": True} if dependent else {}),
        )
