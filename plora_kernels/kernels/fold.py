"""Fold modules into one weight W, in place or into another tensor, with one read of W and one write of the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.counter_rng import seed_halves
from plora_kernels.kernels.counter_rng import element_words, round_stochastically
from plora_kernels.kernels.device_functions import load_modules
from plora_kernels.kernels.launch import (
    cdiv,
    constants,
    dot_precision,
    dtype_name,
    has_wide_factors,
    is_aligned,
    needs_wide_offsets,
    strides,
)
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import FoldBlocks, ShapeClass
from plora_kernels.tuning.lookup import find_blocks


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def fold_kernel(
    weight_ptr,
    out_ptr,
    a_ptr,
    b_ptr,
    index_ptr,
    first_tile,
    N,
    K,
    R,
    scale,
    seed_low,
    seed_high,
    stride_wn,
    stride_wk,
    stride_on,
    stride_ok,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write out = W + s·Σ_j b_j a_jᵀ for one (BLOCK_N, BLOCK_K) tile, summed in fp32 and rounded once.

    weight and out (N, K), possibly the same matrix; a (R, K), b (N, R), index (R,) int32 or None. The factors have the
    dtype of the weight, or fp32 and enter their products unrounded, by PRECISION. R is the number of
    modules, or of entries of the index, and at most BLOCK_R if ONE_BLOCK. The weight's tiles begin with program
    first_tile, or with the first one for None. They are numbered along K first, so that neighbouring programs complete
    the same rows. `fold_many_kernel` calls this for one of many weights.
    """
    tile = tl.program_id(0) if first_tile is None else tl.program_id(0) - first_tile
    tiles_k = tl.cdiv(K, BLOCK_K)
    first_row, first_column = (tile // tiles_k) * BLOCK_N, (tile % tiles_k) * BLOCK_K
    # A tile's base is a 64-bit scalar, since N·K may exceed 2³¹; offsets inside take 32 bits, unless WIDE_OFFSETS.
    offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
    rows = tl.arange(0, BLOCK_N).to(offset_type)  # (BLOCK_N,)
    columns = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
    row_ok, column_ok = rows < N - first_row, columns < K - first_column
    tile_ok = row_ok[:, None] & column_ok[None, :]
    base_row, base_column = first_row.to(tl.int64), first_column.to(tl.int64)

    # The weight, the one large load, is issued first: the factors are small, cached, and arrive while it is in flight.
    weight_base = weight_ptr + base_row * stride_wn + base_column * stride_wk
    w = tl.load(weight_base + rows[:, None] * stride_wn + columns[None, :] * stride_wk, mask=tile_ok, other=0.0)
    a_base, b_base = a_ptr + base_column * stride_ak, b_ptr + base_row * stride_bn
    delta = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for r0 in range(0, BLOCK_R if ONE_BLOCK else R, BLOCK_R):
        modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, offset_type)
        a_offsets = modules[:, None] * stride_ar + columns[None, :] * stride_ak
        a = tl.load(a_base + a_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)  # (BLOCK_R, BLOCK_K)
        b_offsets = rows[:, None] * stride_bn + modules[None, :] * stride_br
        b = tl.load(b_base + b_offsets, mask=row_ok[:, None] & module_ok[None, :], other=0.0)  # (BLOCK_N, BLOCK_R)
        delta = tl.dot(b, a, delta, input_precision=PRECISION)  # (BLOCK_N, BLOCK_K) fp32

    total = w.to(tl.float32) + scale * delta  # (BLOCK_N, BLOCK_K) fp32
    if STOCHASTIC:
        bits = element_words(seed_low, seed_high, first_row + rows, first_column + columns)  # (BLOCK_N, BLOCK_K)
        result = round_stochastically(total, bits, w.dtype)
    else:
        result = total.to(w.dtype)
    out_base = out_ptr + base_row * stride_on + base_column * stride_ok
    tl.store(out_base + rows[:, None] * stride_on + columns[None, :] * stride_ok, result, mask=tile_ok)


def fold_precision(weight: Tensor, lora_A: Tensor) -> str:
    """Return tl.dot's input precision for a fold of these factors.

    fp32 factors beside half precision are multiplied as three products of tf32 parts ("tf32x3"), whose error is that of
    fp32: FMA instructions ("ieee"), the only way on other devices, would take longer than the weight's memory traffic.
    """
    if not has_wide_factors(weight, lora_A):
        return dot_precision(weight.dtype)
    return "tf32x3" if lookup.hardware_of(weight.device).capability >= 80 else "ieee"


def fold(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float, seed: int | None, out: Tensor
) -> None:
    """Write W + s·Σ_j b_j a_jᵀ over the modules named by `index` (None: all) to `out` (N, K), which may be `weight`.

    Factors in fp32 beside a weight in half precision are multiplied in fp32. With a seed the sum is rounded
    stochastically (fp16, bf16), otherwise to nearest.
    """
    (n, k), width = weight.shape, lora_A.shape[0] if index is None else index.shape[0]
    if weight.numel() == 0:
        return
    shape = ShapeClass("fold", dtype_name(weight.dtype), n, k, n, width)
    aligned, wide = is_aligned(weight) and is_aligned(out), has_wide_factors(weight, lora_A)
    blocks = find_blocks(FoldBlocks, shape, weight.device, aligned, wide_factors=wide)
    grid = (cdiv(n, blocks.block_n) * cdiv(k, blocks.block_k),)
    with torch.cuda.device_of(weight):
        fold_kernel[grid](
            *(weight, out, lora_A, lora_B, index),
            None,  # the weight's tiles begin with the first program
            *(n, k, width),
            scale,
            *seed_halves(seed or 0),
            *strides(weight, out, lora_A, lora_B),
            **constants(blocks),
            ONE_BLOCK=width <= blocks.block_r,
            STOCHASTIC=seed is not None,
            WIDE_OFFSETS=needs_wide_offsets(256, weight, out, lora_A, lora_B),
            PRECISION=fold_precision(weight, lora_A),
        )
