"""The loop that kernels with loads by pointer share: a tile of the base product, the side product beside it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(
    in_base,
    main_base,
    down_base,
    rows,
    columns,
    depth,
    modules,
    row_ok,
    column_ok,
    module_ok,
    D_IN,
    stride_im,
    stride_id,
    stride_wd,
    stride_wo,
    stride_dd,
    stride_dr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SIDE_GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `(acc, side)`: in · main (BLOCK_M, BLOCK_N) and in · down (BLOCK_M, BLOCK_R), both fp32.

    Bases point to the tile's first row, first column and first module; rows (BLOCK_M,), columns (BLOCK_N,), depth
    (BLOCK_K,) and modules (BLOCK_R,) are offsets from there, 32 bits wide where those suffice, and `*_ok` say which
    exist. With SIDE_GIVEN the side product is not made: zeros.
    """
    in_offsets = rows[:, None] * stride_im + depth[None, :] * stride_id
    main_offsets = depth[:, None] * stride_wd + columns[None, :] * stride_wo
    down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
    in_step = tl.full((), BLOCK_K, tl.int64) * stride_id
    main_step = tl.full((), BLOCK_K, tl.int64) * stride_wd
    down_step = tl.full((), BLOCK_K, tl.int64) * stride_dd
    # The steps of `down` add to an offset, not to its pointer. For AMD GPUs Triton 3.6 compiles no pointer that a loop
    # carries and its pipeline still steps and loads from behind the loop, as it does with narrow matrices.
    down_start = tl.full((), 0, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, D_IN, BLOCK_K):
        depth_ok = depth < D_IN - k
        a = tl.load(in_base + in_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(
            main_base + main_offsets, mask=depth_ok[:, None] & column_ok[None, :], other=0.0
        )  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N) fp32
        if not SIDE_GIVEN:
            d = tl.load(
                down_base + down_start + down_offsets, mask=depth_ok[:, None] & module_ok[None, :], other=0.0
            )  # (BLOCK_K, BLOCK_R)
            side = tl.dot(a, d, side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
            down_start += down_step
        in_base += in_step
        main_base += main_step
    return acc, side
