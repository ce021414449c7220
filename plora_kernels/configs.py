"""Block sizes of the kernels: a safe choice per dtype and shape class.

Plain data and host arithmetic: no Triton, no device query beyond what a caller passes. Every choice here fits the
shared memory of sm_80 (163 KiB a block) and sm_90 and compiles without a register spill; a test holds that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MatmulBlocks:
    """Tiles of the adapted matmul: out tile (block_m, block_n), depth block_k, modules block_r at a time."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradientBlocks:
    """Tiles of dA and dB: block_r modules × block_d columns, block_m rows a step, rows cut into `splits` parts."""

    block_m: int
    block_d: int
    block_r: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class FoldBlocks:
    """Tiles of the fold: (block_n, block_k) of the weight, block_r modules at a time."""

    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


def tile(size: int, most: int) -> int:
    """Return the smallest power of two ≥ size, held to 16 … most (a tl.dot axis is at least 16)."""
    return min(most, max(16, 1 << max(0, size - 1).bit_length()))


def matmul_blocks(
    capability: int, dtype: torch.dtype, rows: int, d_out: int, width: int, aligned: bool
) -> MatmulBlocks:
    """Return the tiles for out (rows, d_out) with `width` module places.

    Args:
        capability: 10·major + minor of a CUDA device (90 for sm_90); 0 for any other.
        aligned: the large matrices load in wide, asynchronous pieces. Where one does not, its elements are addressed
            one by one, which takes registers: tiles are smaller.
    """
    if dtype.itemsize >= 4:  # fp32 through FMA or tf32: twice the shared memory an element, smaller tiles
        return MatmulBlocks(tile(rows, 64), tile(d_out, 64), 16, 16, 8, 4 if aligned else 8, 3)
    if not aligned:
        return MatmulBlocks(tile(rows, 64), tile(d_out, 64), 32, tile(width, 32), 8, 8, 3)
    block_m, block_n = tile(rows, 128), tile(d_out, 128)
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    if 90 <= capability < 120:  # sm_90 and sm_100 multiply from shared memory; sm_120 has less than half of it
        return MatmulBlocks(block_m, block_n, 64, tile(width, 64), 8, warps, 3)
    return MatmulBlocks(block_m, block_n, 32, tile(width, 32), 8, warps, 3)


def gradient_blocks(dtype: torch.dtype, rows: int, d: int, width: int) -> GradientBlocks:
    """Return the tiles and the number of row splits for a factor gradient of `width` modules and d columns."""
    block_m = 32 if dtype.itemsize >= 4 else 64
    block_d = tile(d, 128)
    # About 256 programs keep a large GPU busy; fewer rows a split than 512 would make the second pass the longer one.
    programs = -(-d // block_d) * -(-width // 64)
    splits = max(1, min(-(-256 // programs), -(-rows // 512)))
    return GradientBlocks(block_m, block_d, tile(width, 64), splits, 4, 3)


def fold_blocks(dtype: torch.dtype, n: int, k: int, width: int, aligned: bool) -> FoldBlocks:
    """Return the tiles for folding `width` modules into a weight (n, k); `aligned` as for `matmul_blocks`."""
    if not aligned:
        return FoldBlocks(tile(n, 32), tile(k, 64), 16, 4, 2)
    if dtype.itemsize >= 4:
        return FoldBlocks(tile(n, 32), tile(k, 128), 16, 4, 2)
    return FoldBlocks(tile(n, 64), tile(k, 128), tile(width, 32), 4, 2)
