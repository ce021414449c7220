"""Backward of adapted linears of one input: their joint dX, and dS, dA, dB of each.

    dX  = Σ_p (dY_p W_p + s_p dS_p A_p),  dS_p = dY_p B_p

In the kernel all projections add to one fp32 accumulator, so dX is rounded once and needs no separate additions. Where
`are_joined` says no, torch's own matmuls add in place to dX instead, which is rounded after each. dS_p is the side
product of the backward (`side_product.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.device_functions import add_scaled_product, tile_position
from plora_kernels.kernels.factor_gradient import factor_gradient_
from plora_kernels.kernels.launch import cdiv, constants, dot_precision, is_aligned, needs_wide_offsets
from plora_kernels.kernels.output_gradient import output_gradient_
from plora_kernels.kernels.projections_forward import are_joined, find_projection_blocks
from plora_kernels.kernels.replay import empty, launch, replayed, zeros
from plora_kernels.kernels.side_product import side_product


@triton.jit
def projections_input_gradient_kernel(
    dy_ptrs,
    weight_ptrs,
    ds_ptrs,
    a_ptrs,
    dx_ptr,
    M,
    K,
    widths,
    ranks,
    scales,
    strides_dm,
    strides_dn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one (BLOCK_M, BLOCK_K) tile of dX, all projections summed in one fp32 accumulator and rounded once.

    dx (M, K) is contiguous. Tuples with one entry per projection: dy (M, N_p) has any strides; weight (N_p, K),
    ds (M, R_p) and a (R_p, K) are contiguous; widths N_p, ranks R_p (may be 0), scales s_p.
    """
    pid_m, pid_k = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
    rows = tl.arange(0, BLOCK_M).to(offset_type)  # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
    depth = tl.arange(0, BLOCK_N).to(offset_type)  # (BLOCK_N,)
    modules = tl.arange(0, BLOCK_R).to(offset_type)  # (BLOCK_R,)
    row_ok, column_ok = rows < M - pid_m * BLOCK_M, columns < K - pid_k * BLOCK_K
    first_row, first_column = (pid_m * BLOCK_M).to(tl.int64), (pid_k * BLOCK_K).to(tl.int64)
    dtype = dx_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for p in tl.static_range(PROJECTIONS):
        dy_base = dy_ptrs[p] + first_row * strides_dm[p]
        dy_offsets = rows[:, None] * strides_dm[p] + depth[None, :] * strides_dn[p]
        dy_step = tl.full((), BLOCK_N, tl.int64) * strides_dn[p]
        weight_base = weight_ptrs[p] + first_column
        weight_offsets = depth[:, None] * K + columns[None, :]
        weight_step = tl.full((), BLOCK_N, tl.int64) * K
        dy_start, weight_start = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)  # offsets, as in `multiply`
        for n in range(0, widths[p], BLOCK_N):
            depth_ok = depth < widths[p] - n
            dy = tl.load(
                dy_base + dy_start + dy_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0
            )  # (BLOCK_M, BLOCK_N)
            w = tl.load(
                weight_base + weight_start + weight_offsets, mask=depth_ok[:, None] & column_ok[None, :], other=0.0
            )  # (BLOCK_N, BLOCK_K)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)·(BLOCK_N, BLOCK_K), fp32
            dy_start += dy_step
            weight_start += weight_step

        ds_base = ds_ptrs[p] + first_row * ranks[p]
        ds_offsets = rows[:, None] * ranks[p] + modules[None, :]
        a_base = a_ptrs[p] + first_column
        ds_start, a_start = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        a_offsets = modules[:, None] * K + columns[None, :]
        for r0 in range(0, ranks[p], BLOCK_R):
            module_ok = modules < ranks[p] - r0
            ds = tl.load(ds_base + ds_start + ds_offsets, mask=row_ok[:, None] & module_ok[None, :], other=0.0)
            a = tl.load(a_base + a_start + a_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)
            acc = add_scaled_product(ds.to(tl.float32), a, acc, scales[p], dtype, PRECISION)  # (BLOCK_M, BLOCK_K) fp32
            ds_start += BLOCK_R
            a_start += tl.full((), BLOCK_R, tl.int64) * K

    dx_base = dx_ptr + first_row * K + first_column
    dx_offsets = rows[:, None] * K + columns[None, :]
    tl.store(dx_base + dx_offsets, acc.to(dtype), mask=row_ok[:, None] & column_ok[None, :])


@replayed
def input_gradient(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dss: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    """Return dX (M, K) = Σ_p (dY_p W_p + s_p·dS_p A_p), in one launch if the projections `are_joined`.

    Shapes: dy (M, N_p), weight (N_p, K) contiguous, ds (M, R_p) = dY_p B_p, lora_A (R_p, K), in fp32 or the dtype of
    the others; R_p may be 0.
    """
    rows, k = dys[0].shape[0], weights[0].shape[1]
    widths, ranks = tuple(w.shape[0] for w in weights), tuple(a.shape[0] for a in lora_As)
    aligned = all(is_aligned(tensor) for tensor in (*dys, *weights)) and k % 16 == 0
    if not are_joined(rows, dys[0].dtype, dys[0].device, aligned):
        return _input_gradient_by_torch(dys, weights, dss, lora_As, scales)
    dx = empty((rows, k), dys[0].dtype, dys[0].device)
    if rows == 0:
        return dx
    blocks = find_projection_blocks("projections_input_gradient", dx, sum(widths), k, max(ranks), aligned, False)
    with torch.cuda.device_of(dx):
        launch(
            projections_input_gradient_kernel,
            (cdiv(rows, blocks.block_m) * cdiv(k, blocks.block_n),),
            tuple(dys),
            tuple(weights),
            tuple(ds.contiguous() for ds in dss),
            tuple(a.contiguous() for a in lora_As),
            dx,
            *(rows, k, widths, ranks, tuple(scales)),
            tuple(dy.stride(0) for dy in dys),
            tuple(dy.stride(1) for dy in dys),
            # The columns of dX are K, and the sum runs over N.
            **constants(replace(blocks, block_n=blocks.block_k, block_k=blocks.block_n)),
            PROJECTIONS=len(widths),
            WIDE_OFFSETS=needs_wide_offsets(256, dx, *dys, *weights),
            PRECISION=dot_precision(dx.dtype),
        )
    return dx


def _input_gradient_by_torch(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dss: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    """Return dX by torch's own matmuls, as the design "algebra_first" does; see `input_gradient`.

    The low-rank parts of all projections are one product over all their modules; dY_p W_p are added to it in place.
    """
    shape, dtype = (dys[0].shape[0], weights[0].shape[1]), dys[0].dtype
    # Not allocated by `replay.empty`: a call that contains torch's own matmuls is never replayed.
    dx = torch.empty(shape, dtype=dtype, device=dys[0].device)
    products = list(zip(dys, weights, strict=True))
    if any(a.shape[0] for a in lora_As):
        alpha = 1.0
        if len(set(scales)) == 1:
            alpha = scales[0]  # applied in fp32
        elif dtype is torch.float16:  # as in `add_scaled_product`: s·dS may exceed fp16's 65504
            lora_As = [a * scale for a, scale in zip(lora_As, scales, strict=True)]
        else:
            dss = [ds * scale for ds, scale in zip(dss, scales, strict=True)]
        torch.addmm(dx, torch.cat(tuple(dss), 1), torch.cat(tuple(lora_As)).to(dtype), beta=0, alpha=alpha, out=dx)
    else:
        torch.mm(*products.pop(0), out=dx)
    for dy, weight in products:
        dx.addmm_(dy, weight)
    return dx


@replayed
def factor_gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    index: Tensor | None,
    scale: float,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return one projection's `(dS, dA, dB)`: dS (M, R) = dY B, dA (R, K) = s·dSᵀ x and dB (N, R) = s·dYᵀ S.

    Shapes: dy (M, N), x (M, K), s (M, R), index int32 or None for all modules. dA and dB are zero for modules that the
    index does not name, in the factors' dtype, and None if not needed. dS and dB come from one read of dY where
    `output_gradient_` does so.
    """
    make = empty if index is None else zeros
    d_lora_A = make(lora_A.shape, lora_A.dtype, dy.device) if need_A else None
    d_lora_B = make(lora_B.shape, lora_B.dtype, dy.device) if need_B else None
    if d_lora_B is not None and dy.shape[0] > 0:
        ds = output_gradient_(d_lora_B, dy, lora_B, s, index=None, out_index=index, scale=scale)
    else:
        ds = side_product(dy, lora_B, index=None, dropout=None)
        if d_lora_B is not None:
            factor_gradient_(d_lora_B.t(), s, dy, thin_index=index, out_index=index, scale=scale)
    if d_lora_A is not None:
        factor_gradient_(d_lora_A, ds, x, thin_index=index, out_index=index, scale=scale)
    return ds, d_lora_A, d_lora_B
