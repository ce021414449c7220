"""One launch for a matmul with a low-rank side branch: out = in · main + bias + s·((in · down) ⊙ m) · up.

The forward and dX are the same computation with other matrices:

    forward   y  = x Wᵀ + bias + s((x Aᵀ) ⊙ m) Bᵀ     in = x,  main = Wᵀ, down = Aᵀ, up = Bᵀ
    dX        dx = dY W        + s((dY B) ⊙ m) A      in = dY, main = W,  down = B,  up = A

so one kernel serves both, told apart by strides. Each output tile recomputes its rows of the side product
in · down while it streams `in` for the main product: R/BLOCK_N more arithmetic, no second pass over `in` or `out`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import MatmulBlocks, ShapeClass
from ..configs import find_blocks


@triton.jit
def _load_modules(index_ptr, r0, R, BLOCK_R: tl.constexpr, HAS_INDEX: tl.constexpr, offset_type: tl.constexpr):
    """Return the module numbers of places r0 … r0+BLOCK_R−1 and which of them stand for a module: (BLOCK_R,)."""
    places = r0 + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    present = places < R
    if HAS_INDEX:
        modules = tl.load(index_ptr + places, mask=present, other=-1)
        present = modules >= 0
        modules = tl.where(present, modules, 0).to(offset_type)
    else:
        modules = places.to(offset_type)
    return modules, present


@triton.jit
def _add_scaled_product(side, up, acc, scale, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + s · side · up: side (BLOCK_M, BLOCK_R) fp32, up (BLOCK_R, BLOCK_N), acc (BLOCK_M, BLOCK_N) fp32."""
    if dtype == tl.float16:
        # side · s may pass fp16's 65504 where side and the result do not: the smaller factor takes the scale.
        product = tl.dot(side.to(dtype), (up.to(tl.float32) * scale).to(dtype), acc, input_precision=PRECISION)
    else:
        product = tl.dot((side * scale).to(dtype), up, acc, input_precision=PRECISION)  # one rounding less
    return product


@triton.jit
def _store_side(side_base, side, rows, row_ok, r0, R, stride_sm, BLOCK_R: tl.constexpr):
    """Store the side product of places r0 … r0+BLOCK_R−1: (BLOCK_M, BLOCK_R)."""
    places = r0 + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    side_offsets = rows[:, None] * stride_sm + places[None, :]
    tl.store(side_base + side_offsets, side, mask=row_ok[:, None] & (places < R)[None, :])


@triton.jit
def adapted_matmul_kernel(
    in_ptr,
    main_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
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
    stride_wd,
    stride_wo,
    stride_dr,
    stride_dd,
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
    HAS_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    STORE_SIDE: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one (BLOCK_M, BLOCK_N) tile of out; the programs of the first column also store in · down.

    in (M, D_IN), main (D_IN, D_OUT), down (D_IN, R), up (R, D_OUT), bias (D_OUT,), index (R,) int32 or unused,
    out (M, D_OUT), side (M, R) = in · down in the dtype of `in`. R counts places: modules, or entries of the index.
    Sums run in fp32; the side product is rounded to the inputs' dtype before it meets `up`.
    """
    # Neighbouring programs share columns of main while it is in the cache: GROUP_M row tiles at a time.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(D_OUT, BLOCK_N)
    pid = tl.program_id(0)
    group_width = GROUP_M * tiles_n
    first_m = (pid // group_width) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + (pid % group_width) % group_m
    pid_n = (pid % group_width) // group_m

    # A tile's base is a 64-bit scalar, since M·D_IN may pass 2³¹; offsets inside a tile take 32 bits, half the
    # registers, unless the launcher saw strides so large that even those would not fit.
    offset_type = tl.int64 if WIDE_OFFSETS else tl.int32
    rows = tl.arange(0, BLOCK_M).to(offset_type)  # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_N).to(offset_type)  # (BLOCK_N,)
    depth = tl.arange(0, BLOCK_K).to(offset_type)  # (BLOCK_K,)
    row_ok, column_ok = rows < M - pid_m * BLOCK_M, columns < D_OUT - pid_n * BLOCK_N
    first_row, first_column = (pid_m * BLOCK_M).to(tl.int64), (pid_n * BLOCK_N).to(tl.int64)
    modules, module_ok = _load_modules(index_ptr, 0, R, BLOCK_R, HAS_INDEX, offset_type)

    in_base = in_ptr + first_row * stride_im
    in_offsets = rows[:, None] * stride_im + depth[None, :] * stride_id
    main_base = main_ptr + first_column * stride_wo
    main_offsets = depth[:, None] * stride_wd + columns[None, :] * stride_wo
    down_base = down_ptr
    down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
    in_step = tl.full((), BLOCK_K, tl.int64) * stride_id
    main_step = tl.full((), BLOCK_K, tl.int64) * stride_wd
    down_step = tl.full((), BLOCK_K, tl.int64) * stride_dd
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, D_IN, BLOCK_K):
        depth_ok = depth < D_IN - k
        a = tl.load(in_base + in_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(
            main_base + main_offsets, mask=depth_ok[:, None] & column_ok[None, :], other=0.0
        )  # (BLOCK_K, BLOCK_N)
        d = tl.load(
            down_base + down_offsets, mask=depth_ok[:, None] & module_ok[None, :], other=0.0
        )  # (BLOCK_K, BLOCK_R)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N) fp32
        side = tl.dot(a, d, side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
        in_base += in_step
        main_base += main_step
        down_base += down_step

    dtype = in_ptr.dtype.element_ty
    up_base = up_ptr + first_column * stride_uo
    side_base = side_ptr + first_row * stride_sm
    up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
    u = tl.load(up_base + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
    side = tl.where(module_ok[None, :], side, 0.0)  # 0 · infinity at places without a module
    acc = _add_scaled_product(side, u, acc, scale, dtype, PRECISION)  # (BLOCK_M, BLOCK_N) fp32
    if STORE_SIDE:  # a constexpr: it may not share a condition with a run-time value
        if pid_n == 0:
            _store_side(side_base, side.to(dtype), rows, row_ok, 0, R, stride_sm, BLOCK_R)

    # Ranks beyond one block read `in` again for their part of the side product: registers hold BLOCK_R of it.
    for r0 in range(BLOCK_R, R, BLOCK_R):
        modules, module_ok = _load_modules(index_ptr, r0, R, BLOCK_R, HAS_INDEX, offset_type)
        in_base = in_ptr + first_row * stride_im
        down_base = down_ptr
        down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
        side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k in range(0, D_IN, BLOCK_K):
            depth_ok = depth < D_IN - k
            a = tl.load(in_base + in_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
            d = tl.load(down_base + down_offsets, mask=depth_ok[:, None] & module_ok[None, :], other=0.0)
            side = tl.dot(a, d, side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
            in_base += in_step
            down_base += down_step
        up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
        u = tl.load(up_base + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)
        side = tl.where(module_ok[None, :], side, 0.0)
        acc = _add_scaled_product(side, u, acc, scale, dtype, PRECISION)  # (BLOCK_M, BLOCK_N) fp32
        if STORE_SIDE:
            if pid_n == 0:
                _store_side(side_base, side.to(dtype), rows, row_ok, r0, R, stride_sm, BLOCK_R)

    if HAS_BIAS:
        bias = tl.load(bias_ptr + pid_n * BLOCK_N + tl.arange(0, BLOCK_N), mask=column_ok, other=0.0)  # (BLOCK_N,)
        acc += bias.to(tl.float32)[None, :]
    out_base = out_ptr + first_row * stride_om + first_column * stride_oo
    out_offsets = rows[:, None] * stride_om + columns[None, :] * stride_oo
    tl.store(out_base + out_offsets, acc.to(dtype), mask=row_ok[:, None] & column_ok[None, :])


def is_aligned(matrix: Tensor) -> bool:
    """Say whether Triton will load lines of this matrix in wide pieces.

    It must be contiguous along one axis, with a stride along the other and a start that 16 divides (elements and
    bytes): what Triton specialises on.
    """
    short, long = sorted(matrix.stride())
    return short == 1 and long % 16 == 0 and matrix.data_ptr() % 16 == 0


def needs_wide_offsets(block: int, *tensors: Tensor) -> bool:
    """Say whether an offset inside a tile of at most block × block elements may pass 2³¹."""
    return any(2 * block * max(tensor.stride()) >= 2**31 for tensor in tensors)


def dot_precision(dtype: torch.dtype) -> str:
    """Return tl.dot's input precision: tf32 for fp32 only where torch's own matmuls may use it, else IEEE."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16, and so on."""
    return str(dtype).removeprefix("torch.")


def adapted_matmul(
    op: str,
    inputs: Tensor,
    main: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    bias: Tensor | None,
    index: Tensor | None,
    scale: float,
    keep_side: bool,
) -> tuple[Tensor, Tensor]:
    """Return `(out, side)`: out (M, D_OUT) = in · main + bias + s·side · up, side (M, R) = (in · down) ⊙ m.

    `op` is "forward" or "input_gradient": what the blocks are looked up by.
    Shapes: inputs (M, D_IN), main (D_IN, D_OUT), down (D_IN, R), up (R, D_OUT), any strides; index int32 or None.
    `side` has one column per place of the index, rounded to the inputs' dtype, and no elements unless `keep_side`.
    """
    (rows, d_in), d_out = inputs.shape, main.shape[1]
    width = down.shape[1] if index is None else index.shape[0]
    out = torch.empty((rows, d_out), dtype=inputs.dtype, device=inputs.device)
    side = torch.empty((rows, width) if keep_side else (0,), dtype=inputs.dtype, device=inputs.device)
    if out.numel() == 0:
        return out, side
    aligned = all(is_aligned(tensor) for tensor in (inputs, main, out))
    shape = ShapeClass(op, dtype_name(inputs.dtype), rows, d_in, d_out, width)
    blocks = find_blocks(MatmulBlocks, shape, inputs.device, aligned)
    grid = (triton.cdiv(rows, blocks.block_m) * triton.cdiv(d_out, blocks.block_n),)
    with torch.cuda.device_of(inputs):
        adapted_matmul_kernel[grid](
            inputs,
            main,
            down,
            up,
            bias.contiguous() if bias is not None else inputs,
            index if index is not None else inputs,
            out,
            side,
            rows,
            d_in,
            d_out,
            width,
            scale,
            *inputs.stride(),
            *main.stride(),
            down.stride(1),
            down.stride(0),
            *up.stride(),
            *out.stride(),
            width,
            BLOCK_M=blocks.block_m,
            BLOCK_N=blocks.block_n,
            BLOCK_K=blocks.block_k,
            BLOCK_R=blocks.block_r,
            GROUP_M=blocks.group_m,
            HAS_BIAS=bias is not None,
            HAS_INDEX=index is not None,
            STORE_SIDE=keep_side,
            WIDE_OFFSETS=needs_wide_offsets(256, inputs, main, down, up, out),
            PRECISION=dot_precision(inputs.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return out, side
