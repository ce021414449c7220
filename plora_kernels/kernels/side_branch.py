"""The side branch of a layer, added in place to an output that another library computed: y += s·((D(x) Aᵀ) ⊙ m) Bᵀ.

It serves few rows over a quantised weight, whose library has a product of its own for them. One launch: every program
computes the side product S = D(x) Aᵀ of its rows anew from x and A, which lie in the L2 cache. At 16 rows of K = 4096
and R 16 that is 0.25 MiB a program, about as much as a first launch for S alone would read in one program, and
without the second launch. Under dropout, whose mask every program would hash again, `side_product` computes S first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.device_functions import add_scaled_product, load_modules, load_side, store_side
from plora_kernels.kernels.launch import Dropout, cdiv, dot_precision, needs_wide_offsets, strides
from plora_kernels.kernels.replay import empty, launch, replayed
from plora_kernels.kernels.side_product import side_product
from plora_kernels.tuning.blocks import tile


@triton.jit
def side_branch_kernel(
    in_ptr,
    down_ptr,
    up_ptr,
    index_ptr,
    out_ptr,
    side_ptr,
    M,
    D_IN,
    D_OUT,
    R,
    scale,
    stride_im,
    stride_id,
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
    SIDE_GIVEN: tl.constexpr,
    STORE_SIDE: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add s · side · up to one (BLOCK_M, BLOCK_N) tile of out.

    in (M, D_IN), down (D_IN, ·), up (·, D_OUT), index (R,) int32 or None, out (M, D_OUT) in the dtype of `in`; down and
    up may be fp32 beside half precision. side (M, R) = in · down is loaded if SIDE_GIVEN; otherwise it is computed, and
    with STORE_SIDE the programs of the first column store it. R is the number of columns of side. Sums run in fp32; out
    is rounded once more.
    """
    pid_m, pid_n = tl.program_id(1), tl.program_id(0)
    offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
    rows = tl.arange(0, BLOCK_M).to(offset_type)  # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_N).to(offset_type)  # (BLOCK_N,)
    depth = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
    row_ok, column_ok = rows < M - pid_m * BLOCK_M, columns < D_OUT - pid_n * BLOCK_N
    first_row, first_column = (pid_m * BLOCK_M).to(tl.int64), (pid_n * BLOCK_N).to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    side_base = side_ptr + first_row * stride_sm
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, R, BLOCK_R):
        modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, offset_type)
        if SIDE_GIVEN:
            side = load_side(side_base, rows, row_ok, r0, R, stride_sm, BLOCK_R)
        else:
            side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            in_start, down_start = first_row * stride_im, tl.full((), 0, tl.int64)  # offsets, as in `multiply`
            in_offsets = rows[:, None] * stride_im + depth[None, :] * stride_id
            down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
            in_step = tl.full((), BLOCK_K, tl.int64) * stride_id
            down_step = tl.full((), BLOCK_K, tl.int64) * stride_dd
            for k in range(0, D_IN, BLOCK_K):
                depth_ok = depth < D_IN - k
                a = tl.load(
                    in_ptr + in_start + in_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0
                )  # (BLOCK_M, BLOCK_K)
                d = tl.load(
                    down_ptr + down_start + down_offsets, mask=depth_ok[:, None] & module_ok[None, :], other=0.0
                )  # (BLOCK_K, BLOCK_R)
                side = tl.dot(a, d.to(dtype), side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
                in_start += in_step
                down_start += down_step
            side = tl.where(module_ok[None, :], side, 0.0)  # columns without a module hold NaN where `in` is infinite
            if STORE_SIDE:  # a constexpr, in its own `if`: Triton does not mix it with a run-time condition
                if pid_n == 0:
                    store_side(side_base, side.to(dtype), rows, row_ok, r0, R, stride_sm, BLOCK_R)
        up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
        u = tl.load(
            up_ptr + first_column * stride_uo + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0
        )  # (BLOCK_R, BLOCK_N)
        acc = add_scaled_product(side, u.to(dtype), acc, scale, dtype, PRECISION)
    out_tile = out_ptr + first_row * stride_om + first_column * stride_oo
    out_tile += rows[:, None] * stride_om + columns[None, :] * stride_oo
    ok = row_ok[:, None] & column_ok[None, :]
    acc += tl.load(out_tile, mask=ok, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    tl.store(out_tile, acc.to(dtype), mask=ok)


@replayed
def add_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    index: Tensor | None,
    scale: float,
    frozen: bool,
    keep_s: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """Add s·((D(x) Aᵀ) ⊙ m) Bᵀ to y (M, N) in place; return S = D(x) Aᵀ (M, W or R) if `keep_s`, else no elements.

    Shapes: x (M, K), lora_A (R, K), lora_B (N, R), index (W,) int32 or None for all modules. If `frozen`, all R modules
    enter y, and the index names those that the dropout D applies to.
    """
    (rows, d_in), d_out = x.shape, y.shape[1]
    applied, down, up = None if frozen else index, lora_A.t(), lora_B.t()
    width = down.shape[1] if applied is None else applied.shape[0]
    dropout = Dropout.of_layer(index, frozen, dropout_p, dropout_seed)
    if dropout is not None:
        side = side_product(x, down, index=applied, dropout=dropout)
    else:
        side = empty((rows, width) if keep_s else (0,), x.dtype, x.device)
    kept = side if keep_s or dropout is None else empty((0,), x.dtype, x.device)
    if y.numel() == 0 or width == 0:
        return kept
    wide = x.dtype is torch.float32
    block_m, block_n = tile(rows, 32), 64
    with torch.cuda.device_of(x):
        launch(
            side_branch_kernel,
            (cdiv(d_out, block_n), cdiv(rows, block_m)),
            *(x, down, up, applied, y, side),
            *(rows, d_in, d_out, width),
            scale,
            *strides(x, down, up, y),
            width,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=64,
            BLOCK_R=tile(width, 16 if wide else 32),
            num_warps=4,
            num_stages=2 if wide else 3,
            SIDE_GIVEN=dropout is not None,
            STORE_SIDE=keep_s and dropout is None,
            WIDE_OFFSETS=needs_wide_offsets(256, x, down, up, y),
            PRECISION=dot_precision(x.dtype),
        )
    return kept
