"""A candidate that is not in the package: the product with an NF4 weight that is dequantised inside the main loop.

    y = x Wᵀ + s·S Bᵀ,    W[n, k] = code[nibble of (n, k)] · scales[n, k // 64]

`plora_kernels` dequantises the weight once a call and multiplies the dense copy. This kernel reads the packed weight
instead and decodes a tile as often as there are tiles of rows. docs/kernels.md counts where it may win. It becomes part
of the package if a GPU shows that; until then `python -m bench.audit.nf4_matmul` compiles it for every target.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.audit.command import show
from bench.audit.jobs import Job, row_of
from bench.audit.offline import NOWHERE, TARGETS, compiling_for, refuse_interpreter
from bench.checks.designs import Shape

BLOCK = 64  # elements that share a scale, along K


@triton.jit
def nf4_matmul_kernel(
    in_ptr,
    packed_ptr,
    scales_ptr,
    code_ptr,
    side_ptr,
    up_ptr,
    out_ptr,
    M,
    D_IN,
    D_OUT,
    R,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute one (BLOCK_M, BLOCK_N) tile of out, as its transpose: then the decoded tile is the left operand.

    in (M, D_IN), packed (D_OUT, D_IN/2) uint8 with even columns in the high nibble, scales (D_OUT, D_IN/BLOCK_K) fp32,
    code (16,) fp32, side (M, R), up (D_OUT, R), out (M, D_OUT); all row-major, D_IN a multiple of BLOCK_K, which is the
    number of elements that share a scale. On Hopper a left operand may stay in registers; a right one would be written
    to shared memory first.
    """
    dtype = in_ptr.dtype.element_ty
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    row_ok, column_ok = rows < M, columns < D_OUT
    depth, half = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(0, D_IN, BLOCK_K):
        packed_tile = packed_ptr + columns[:, None] * (D_IN // 2) + k // 2 + half[None, :]
        packed = tl.load(packed_tile, mask=column_ok[:, None], other=0)  # (BLOCK_N, BLOCK_K/2) uint8
        even, odd = tl.load(code_ptr + (packed >> 4)), tl.load(code_ptr + (packed & 15))
        scales = tl.load(scales_ptr + columns * (D_IN // BLOCK_K) + k // BLOCK_K, mask=column_ok, other=0.0)
        w = (tl.interleave(even, odd) * scales[:, None]).to(dtype)  # (BLOCK_N, BLOCK_K)
        a = tl.load(in_ptr + rows[:, None] * D_IN + k + depth[None, :], mask=row_ok[:, None], other=0.0)
        acc = tl.dot(w, tl.trans(a), acc)  # (BLOCK_N, BLOCK_M) fp32
    modules = tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    present = modules < R
    side = tl.load(
        side_ptr + rows[:, None] * R + modules[None, :], mask=row_ok[:, None] & present[None, :], other=0.0
    )  # (BLOCK_M, BLOCK_R)
    up = tl.load(
        up_ptr + columns[:, None] * R + modules[None, :], mask=column_ok[:, None] & present[None, :], other=0.0
    )  # (BLOCK_N, BLOCK_R)
    acc = tl.dot((up.to(tl.float32) * scale).to(dtype), tl.trans(side), acc)
    out_tile = out_ptr + rows[None, :] * D_OUT + columns[:, None]
    tl.store(out_tile, acc.to(dtype), mask=column_ok[:, None] & row_ok[None, :])


def nf4_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    code: Tensor,
    side: Tensor,
    lora_B: Tensor,
    scale: float,
    block_m: int = 128,
    block_n: int = 128,
    warps: int = 8,
    stages: int = 3,
) -> Tensor:
    """Return y (M, N) of x (M, K), packed (N, K/2) uint8, scales (N, K/64), code (16,), side (M, R), lora_B (N, R)."""
    (rows, d_in), (d_out, rank) = x.shape, lora_B.shape
    out = torch.empty((rows, d_out), dtype=x.dtype, device=x.device)
    nf4_matmul_kernel[(-(-d_out // block_n), -(-rows // block_m))](
        *(x, packed, scales, code, side, lora_B, out),
        *(rows, d_in, d_out, rank),
        scale,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK,
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        num_warps=warps,
        num_stages=stages,
    )
    return out


def main() -> int:
    """Compile tiles of several sizes for every target and print their machine code's figures."""
    if refuse_interpreter():
        return 2
    rows = []
    for target in TARGETS.values():
        for block_m, block_n, warps in ((16, 64, 4), (64, 128, 4), (128, 128, 8), (256, 128, 8)):
            job = Job(Shape(256, 4096, 4096, 16), "bfloat16", target, f"{block_m}×{block_n}", candidate=True)
            with compiling_for(target) as launches:
                x, side = (torch.empty(256, d, dtype=torch.bfloat16, device=NOWHERE) for d in (4096, 16))
                packed = torch.empty(4096, 2048, dtype=torch.uint8, device=NOWHERE)
                scales, code = (torch.empty(*shape, device=NOWHERE) for shape in ((4096, 64), (16,)))
                lora_B = torch.empty(4096, 16, dtype=torch.bfloat16, device=NOWHERE)
                nf4_matmul(x, packed, scales, code, side, lora_B, 2.0, block_m, block_n, warps)
            rows += [row_of(launch, job) for launch in launches]
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
