"""Fold modules into the weight, in place: one read and one write of W."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import FoldBlocks, ShapeClass
from ..configs import find_blocks
from .adapted_matmul import _load_modules, dot_precision, dtype_name, is_aligned


@triton.jit
def fold_kernel(
    weight_ptr,
    a_ptr,
    b_ptr,
    index_ptr,
    N,
    K,
    R,
    scale,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add s·Σ_j b_j a_jᵀ over the indexed modules to one (BLOCK_N, BLOCK_K) tile of W, in fp32, rounded once.

    weight (N, K), a (R, K), b (N, R), index int32 or unused; R counts places.
    """
    rows = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # (BLOCK_N,)
    columns = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)  # (BLOCK_K,)
    row_ok, column_ok = rows < N, columns < K
    tile_ok = row_ok[:, None] & column_ok[None, :]
    tile = weight_ptr + rows[:, None] * stride_wn + columns[None, :] * stride_wk
    w = tl.load(tile, mask=tile_ok, other=0.0)  # (BLOCK_N, BLOCK_K)
    delta = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for r0 in range(0, R, BLOCK_R):
        modules, module_ok = _load_modules(index_ptr, r0, R, BLOCK_R, HAS_INDEX, tl.int64)
        b_tile = b_ptr + rows[:, None] * stride_bn + modules[None, :] * stride_br
        b = tl.load(b_tile, mask=row_ok[:, None] & module_ok[None, :], other=0.0)  # (BLOCK_N, BLOCK_R)
        a_tile = a_ptr + modules[:, None] * stride_ar + columns[None, :] * stride_ak
        a = tl.load(a_tile, mask=module_ok[:, None] & column_ok[None, :], other=0.0)  # (BLOCK_R, BLOCK_K)
        delta = tl.dot(b, a, delta, input_precision=PRECISION)  # (BLOCK_N, BLOCK_K) fp32
    tl.store(tile, (w.to(tl.float32) + scale * delta).to(w.dtype), mask=tile_ok)


def fold_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float) -> None:
    """Add s·Σ_j b_j a_jᵀ over the modules named by `index` (None: all) to weight (N, K), in place."""
    (n, k), width = weight.shape, lora_A.shape[0] if index is None else index.shape[0]
    if width == 0 or weight.numel() == 0:
        return
    shape = ShapeClass("fold", dtype_name(weight.dtype), n, k, n, width)
    blocks = find_blocks(FoldBlocks, shape, weight.device, is_aligned(weight))
    grid = (triton.cdiv(k, blocks.block_k), triton.cdiv(n, blocks.block_n))
    with torch.cuda.device_of(weight):
        fold_kernel[grid](
            weight,
            lora_A,
            lora_B,
            index if index is not None else weight,
            n,
            k,
            width,
            scale,
            *weight.stride(),
            *lora_A.stride(),
            *lora_B.stride(),
            BLOCK_N=blocks.block_n,
            BLOCK_K=blocks.block_k,
            BLOCK_R=blocks.block_r,
            HAS_INDEX=index is not None,
            PRECISION=dot_precision(weight.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
