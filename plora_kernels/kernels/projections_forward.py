"""Several adapted linears of one input, in one launch where that is fastest.

    y_p = x W_pᵀ + bias_p + s_p (x A_pᵀ) B_pᵀ             for every projection p

Each projection keeps its own tensors: the kernel takes tuples of pointers and computes a tile's projection from the
tile's number. No tensors are concatenated or copied, and tiles of narrow projections share waves. S_p = x A_pᵀ is the
side product (`side_product.py`). Where `are_joined` says no, each projection runs by itself, as a layer alone does
(`adapted_matmul.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.adapted_matmul import adapted_matmul, find_matmul_blocks
from plora_kernels.kernels.device_functions import add_scaled_product, multiply, tile_position
from plora_kernels.kernels.launch import (
    cdiv,
    constants,
    dot_precision,
    dtype_name,
    has_wide_factors,
    is_aligned,
    needs_wide_offsets,
)
from plora_kernels.kernels.replay import empty, launch, replayed
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import MatmulBlocks, ShapeClass, tile
from plora_kernels.tuning.lookup import find_blocks


@triton.jit
def projections_forward_kernel(
    x_ptr,
    weight_ptrs,
    a_ptrs,
    b_ptrs,
    bias_ptrs,
    y_ptrs,
    s_ptrs,
    M,
    K,
    widths,
    ranks,
    scales,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    STORE_SIDE: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one (BLOCK_M, BLOCK_N) tile of one projection's y; tiles of its first column also store x A_pᵀ.

    x (M, K) has any strides. Tuples with one entry per projection: weight (N_p, K), a (R_p, K), b (N_p, R_p),
    y (M, N_p) and s (M, R_p) are contiguous, bias (N_p,) may be None; widths N_p, ranks R_p (may be 0), scales s_p.
    Sums run in fp32; the side product is rounded to the inputs' dtype before it is multiplied by b.
    """
    tiles_n = tl.cdiv(widths[0], BLOCK_N)
    for p in tl.static_range(1, PROJECTIONS):
        tiles_n += tl.cdiv(widths[p], BLOCK_N)
    pid_m, pid_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)

    # This tile belongs to the last projection whose first column of tiles is at or before the tile's column.
    projection = pid_n * 0
    first_tile = pid_n * 0
    start = tl.cdiv(widths[0], BLOCK_N)
    weight_ptr, a_ptr, b_ptr, y_ptr, s_ptr = weight_ptrs[0], a_ptrs[0], b_ptrs[0], y_ptrs[0], s_ptrs[0]
    N, R, scale = widths[0], ranks[0], scales[0]
    for p in tl.static_range(1, PROJECTIONS):
        here = pid_n >= start
        projection = tl.where(here, p, projection)
        first_tile = tl.where(here, start, first_tile)
        weight_ptr = tl.where(here, weight_ptrs[p], weight_ptr)
        a_ptr = tl.where(here, a_ptrs[p], a_ptr)
        b_ptr = tl.where(here, b_ptrs[p], b_ptr)
        y_ptr = tl.where(here, y_ptrs[p], y_ptr)
        s_ptr = tl.where(here, s_ptrs[p], s_ptr)
        N = tl.where(here, widths[p], N)
        R = tl.where(here, ranks[p], R)
        scale = tl.where(here, scales[p], scale)
        start += tl.cdiv(widths[p], BLOCK_N)
    pid_n -= first_tile

    # A tile's start is a 64-bit scalar; offsets inside it take 32 bits, unless these overflow (WIDE_OFFSETS).
    offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
    rows = tl.arange(0, BLOCK_M).to(offset_type)  # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_N).to(offset_type)  # (BLOCK_N,)
    depth = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
    row_ok, column_ok = rows < M - pid_m * BLOCK_M, columns < N - pid_n * BLOCK_N
    first_row, first_column = (pid_m * BLOCK_M).to(tl.int64), (pid_n * BLOCK_N).to(tl.int64)
    modules = tl.arange(0, BLOCK_R).to(offset_type)  # (BLOCK_R,)
    module_ok = modules < R
    acc, side = multiply(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        x_ptr + first_row * stride_xm,
        weight_ptr + first_column * K,
        a_ptr,
        rows, columns, depth, modules, row_ok, column_ok, module_ok,
        K, stride_xm, stride_xk, 1, K, 1, K,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, False, PRECISION,
    )  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    s_base = s_ptr + first_row * R
    b_base = b_ptr + first_column * R
    s_offsets = rows[:, None] * R + modules[None, :]
    b_offsets = columns[None, :] * R + modules[:, None]
    side = tl.where(module_ok[None, :], side, 0.0)  # columns without a module hold NaN where x is infinite
    b = tl.load(b_base + b_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
    acc = add_scaled_product(side, b, acc, scale, dtype, PRECISION)  # (BLOCK_M, BLOCK_N) fp32
    if STORE_SIDE:  # a constexpr, in its own `if`: Triton does not mix it with a run-time condition
        if pid_n == 0:
            tl.store(s_base + s_offsets, side.to(dtype), mask=row_ok[:, None] & module_ok[None, :])

    # For further blocks of modules x is loaded again: registers hold only BLOCK_R columns of the side product.
    x_offsets = rows[:, None] * stride_xm + depth[None, :] * stride_xk
    x_step = tl.full((), BLOCK_K, tl.int64) * stride_xk
    a_offsets = modules[None, :] * K + depth[:, None]
    for r0 in range(BLOCK_R, R, BLOCK_R):
        module_ok = modules < R - r0
        a_ptr += tl.full((), BLOCK_R, tl.int64) * K
        x_start, a_start = first_row * stride_xm, tl.full((), 0, tl.int64)  # offsets, as in `multiply`
        side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            depth_ok = depth < K - k
            x = tl.load(
                x_ptr + x_start + x_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0
            )  # (BLOCK_M, BLOCK_K)
            a = tl.load(a_ptr + a_start + a_offsets, mask=depth_ok[:, None] & module_ok[None, :], other=0.0)
            side = tl.dot(x, a.to(x.dtype), side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
            x_start += x_step
            a_start += BLOCK_K
        side = tl.where(module_ok[None, :], side, 0.0)
        b = tl.load(b_base + r0 + b_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)
        acc = add_scaled_product(side, b, acc, scale, dtype, PRECISION)  # (BLOCK_M, BLOCK_N) fp32
        if STORE_SIDE:
            if pid_n == 0:
                tl.store(s_base + r0 + s_offsets, side.to(dtype), mask=row_ok[:, None] & module_ok[None, :])

    for p in tl.static_range(PROJECTIONS):
        if bias_ptrs[p] is not None:  # known at compile time
            present = tl.where(projection == p, N - pid_n * BLOCK_N, 0)  # masks tiles of other projections
            bias = tl.load(bias_ptrs[p] + first_column + columns, mask=columns < present, other=0.0)  # (BLOCK_N,)
            acc += bias.to(tl.float32)[None, :]
    y_base = y_ptr + first_row * N + first_column
    y_offsets = rows[:, None] * N + columns[None, :]
    tl.store(y_base + y_offsets, acc.to(dtype), mask=row_ok[:, None] & column_ok[None, :])


# Up to so many rows narrow projections alone have too few tiles to fill a device.
FEW_ROWS = 1024


def find_projection_blocks(
    op: str, inputs: Tensor, d_in: int, d_out: int, rank: int, aligned: bool, wide_factors: bool
) -> MatmulBlocks:
    """Return the blocks of projections that share their input; `d_in` and `d_out` are as in `ShapeClass`.

    `op` is "projections_forward" or "projections_input_gradient", `inputs` has the number of rows and the dtype, `rank`
    is the largest rank, and `wide_factors` says whether main loops load factors in fp32 beside half precision.
    """
    shape = ShapeClass(op, dtype_name(inputs.dtype), inputs.shape[0], d_in, d_out, rank)
    return find_blocks(MatmulBlocks, shape, inputs.device, aligned, wide_factors=wide_factors)


def are_joined(rows: int, dtype: torch.dtype, device: torch.device, aligned: bool) -> bool:
    """Say whether projections of one input are computed in one launch, rather than each by itself.

    Measured on an H200 in bfloat16, as time ÷ the plain linears': with 8,192 rows one launch, whose tiles have pointer
    loads, takes 1.71 to 1.87 and layers alone, fed by tensor descriptors, 1.11 to 1.31 (forward and backward 1.52 to
    1.62 and 1.18 to 1.50); with 1 and 16 rows one launch takes 0.92 and layers alone 1.95.

    Args:
        rows: of the input.
        dtype, device: the input's.
        aligned: all large matrices are (`is_aligned`), so that descriptors can load them.
    """
    alone_is_fast = dtype.itemsize < 4 and aligned and lookup.hardware_of(device).is_hopper
    return rows <= FEW_ROWS or not alone_is_fast


@replayed
def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
    keep_s: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return `([y_p], [S_p])`: y_p (M, N_p) = x W_pᵀ + bias_p + s_p·S_p B_pᵀ and S_p (M, R_p) = x A_pᵀ.

    Shapes: x (M, K), weight (N_p, K) contiguous, lora_A (R_p, K), lora_B (N_p, R_p), bias (N_p,) or None. R_p may be 0;
    S_p has no elements unless `keep_s`. The factors, of one dtype, have x's, or fp32 and are rounded to x's as they are
    loaded. It is one launch if they `are_joined`.
    """
    rows, k = x.shape
    widths, ranks = tuple(w.shape[0] for w in weights), tuple(a.shape[0] for a in lora_As)
    aligned = all(is_aligned(tensor) for tensor in (x, *weights)) and all(n % 16 == 0 for n in widths)
    if not are_joined(rows, x.dtype, x.device, aligned):
        each = zip(weights, lora_As, lora_Bs, biases, scales, strict=True)
        results = [_forward_alone(x, *operands, keep_s) for operands in each]
        return [y for y, _ in results], [s for _, s in results]
    ys = [empty((rows, n), x.dtype, x.device) for n in widths]
    ss = [empty((rows, r) if keep_s else (0,), x.dtype, x.device) for r in ranks]
    if rows == 0:
        return ys, ss
    wide = has_wide_factors(x, lora_As[0])
    blocks = find_projection_blocks("projections_forward", x, k, sum(widths), max(ranks), aligned, wide)
    # Chosen for the sum of widths, so limited here to the widest one.
    blocks = replace(blocks, block_n=tile(max(widths), blocks.block_n))
    grid = (cdiv(rows, blocks.block_m) * sum(cdiv(n, blocks.block_n) for n in widths),)
    with torch.cuda.device_of(x):
        launch(
            projections_forward_kernel,
            grid,
            x,
            tuple(weights),
            tuple(a.contiguous() for a in lora_As),
            tuple(b.contiguous() for b in lora_Bs),
            tuple(bias if bias is None else bias.contiguous() for bias in biases),
            tuple(ys),
            tuple(ss),
            *(rows, k, widths, ranks, tuple(scales)),
            *x.stride(),
            **constants(blocks),
            PROJECTIONS=len(widths),
            STORE_SIDE=keep_s,
            WIDE_OFFSETS=needs_wide_offsets(256, x, *weights, *ys),
            PRECISION=dot_precision(x.dtype),
        )
    return ys, ss


def _forward_alone(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float, keep_s: bool
) -> tuple[Tensor, Tensor]:
    """Return one projection's `(y, S)`, computed as a layer alone is; see `forward`."""
    rank = lora_A.shape[0]
    if rank == 0:  # the plain linear; with torch's own matmul the call is never replayed
        side = empty((x.shape[0], 0) if keep_s else (0,), x.dtype, x.device)
        return torch.nn.functional.linear(x, weight, bias), side
    main = weight.t()
    y, side = adapted_matmul(
        x,
        main,
        lora_A.t(),
        lora_B.t(),
        bias=bias,
        index=None,
        scale=scale,
        keep_side=keep_s,
        blocks=find_matmul_blocks("forward", x, main, lora_A.t(), rank),
    )
    return y, side if keep_s or side.numel() == 0 else empty((0,), x.dtype, x.device)
