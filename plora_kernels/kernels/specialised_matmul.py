"""The adapted matmul as a persistent kernel with warp specialisation: some warps load, others multiply.

For half precision on sm_90. One warp group only loads tiles by tensor descriptors (TMA), two others multiply 64 rows
each. While these finish and store a tile, the first already loads the next one. The side product (`side_product.py`) is
already in memory and enters as the first steps of the sum, loaded like the others:

    acc = s · side · up,  then  acc += in · main  in the K loop

The kernel makes its descriptors itself. With descriptors made on the host, Triton 3.6 halves each load for the two warp
groups, but still waits for the bytes of a whole one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.device_functions import tile_position
from plora_kernels.kernels.launch import cdiv, constants, launches_dependents
from plora_kernels.kernels.persistent_matmul import load_either_way, takes_descriptors
from plora_kernels.kernels.replay import launch
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import MatmulBlocks


@triton.jit
def specialised_matmul_kernel(
    in_ptr,
    main_ptr,
    up_ptr,
    side_ptr,
    bias_ptr,
    out_ptr,
    M,
    D_IN,
    D_OUT,
    R,
    scale,
    stride_im,
    stride_w,
    stride_u,
    stride_sm,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    MAIN_TRANSPOSED: tl.constexpr,
    UP_TRANSPOSED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    LAUNCHES_DEPENDENTS: tl.constexpr,
):
    """Compute out (M, D_OUT) = in · main + bias + s·side · up, each program several (BLOCK_M, BLOCK_N) tiles in turn.

    in (M, D_IN), side (M, R) and out row-major; main (D_IN, D_OUT) and up (R, D_OUT), given as their transposes if
    *_TRANSPOSED; bias (D_OUT,) or None. Strides are those between rows as given; rows are contiguous. Sums run in
    fp32.
    """
    if (
        DEPENDENT
    ):  # wait for the end of the launch before: it writes the side product, and may still use this one's memory
        tl.extra.cuda.gdc_wait()
    if LAUNCHES_DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
    in_desc = tl.make_tensor_descriptor(in_ptr, [M, D_IN], [stride_im, 1], [BLOCK_M, BLOCK_K])
    side_desc = tl.make_tensor_descriptor(side_ptr, [M, R], [stride_sm, 1], [BLOCK_M, BLOCK_R])
    if MAIN_TRANSPOSED:
        main_desc = tl.make_tensor_descriptor(main_ptr, [D_OUT, D_IN], [stride_w, 1], [BLOCK_N, BLOCK_K])
    else:
        main_desc = tl.make_tensor_descriptor(main_ptr, [D_IN, D_OUT], [stride_w, 1], [BLOCK_K, BLOCK_N])
    if UP_TRANSPOSED:
        up_desc = tl.make_tensor_descriptor(up_ptr, [D_OUT, R], [stride_u, 1], [BLOCK_N, BLOCK_R])
    else:
        up_desc = tl.make_tensor_descriptor(up_ptr, [R, D_OUT], [stride_u, 1], [BLOCK_R, BLOCK_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(D_OUT, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), warp_specialize=True):
        pid_m, pid_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r0 in tl.range(0, R, BLOCK_R):
            side = side_desc.load([pid_m * BLOCK_M, r0])  # (BLOCK_M, BLOCK_R)
            u = load_either_way(up_desc, r0, pid_n * BLOCK_N, UP_TRANSPOSED)  # (BLOCK_R, BLOCK_N)
            acc = tl.dot(side, u, acc)  # (BLOCK_M, BLOCK_N) fp32
        acc *= scale
        for k in tl.range(0, D_IN, BLOCK_K):
            a = in_desc.load([pid_m * BLOCK_M, k])  # (BLOCK_M, BLOCK_K)
            w = load_either_way(main_desc, k, pid_n * BLOCK_N, MAIN_TRANSPOSED)  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(a, w, acc)  # (BLOCK_M, BLOCK_N) fp32
        columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < D_OUT, other=0.0)  # (BLOCK_N,)
            acc += bias.to(tl.float32)[None, :]
        rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        out_tile = out_ptr + rows[:, None].to(tl.int64) * stride_om + columns[None, :]
        tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < D_OUT)[None, :])


def takes_specialised(inputs: Tensor, main: Tensor, up: Tensor, side: Tensor, blocks: MatmulBlocks) -> bool:
    """Say whether this kernel takes a product: half precision, descriptors for all matrices, 64 rows per warp group."""
    halves = blocks.block_m % 128 == 0 and inputs.dtype.itemsize == 2
    return halves and side.numel() > 0 and takes_descriptors(inputs, main, up, side)


def specialised_matmul(
    out: Tensor,
    side: Tensor,
    inputs: Tensor,
    main: Tensor,
    up: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    blocks: MatmulBlocks,
) -> None:
    """Write out (M, D_OUT) = inputs · main + bias + scale · side · up, for operands that `takes_specialised` accepts.

    Shapes: inputs (M, D_IN) and side (M, R) row-major; main (D_IN, D_OUT), up (R, D_OUT), row- or column-major.
    """
    (rows, d_in), d_out = inputs.shape, main.shape[1]
    tiles = cdiv(rows, blocks.block_m) * cdiv(d_out, blocks.block_n)
    main_transposed, up_transposed = main.stride(1) != 1, up.stride(1) != 1
    dependents = launches_dependents(inputs.device)
    dependent = blocks.dependent and dependents
    with torch.cuda.device_of(inputs):
        launch(
            specialised_matmul_kernel,
            (min(lookup.multiprocessors_of(inputs.device), tiles),),
            *(inputs, main.t() if main_transposed else main, up.t() if up_transposed else up, side),
            None if bias is None else bias.contiguous(),
            out,
            *(rows, d_in, d_out, side.shape[1]),
            scale,
            *(inputs.stride(0), max(main.stride()), max(up.stride()), side.stride(0), out.stride(0)),
            **constants(blocks),
            MAIN_TRANSPOSED=main_transposed,
            UP_TRANSPOSED=up_transposed,
            DEPENDENT=dependent,
            LAUNCHES_DEPENDENTS=blocks.gradient_beside and dependents,
            scratch=True,
            **({"launch_pdl": True} if dependent else {}),
        )
