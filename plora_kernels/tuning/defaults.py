"""Safe block sizes for any device, used where no table has tuned ones.

At the shapes of `python -m bench.audit` every default fits the shared memory of its devices and compiles without
register spills; a test checks that.
"""

from __future__ import annotations

from dataclasses import replace

from plora_kernels.tuning.blocks import (
    LAYER_OPS,
    PROJECTION_OPS,
    SIDE_FIRST,
    Blocks,
    FoldBlocks,
    GradientBlocks,
    Hardware,
    MatmulBlocks,
    OutputGradientBlocks,
    ShapeClass,
    SideBlocks,
    shared_bytes,
    tile,
)


def default_blocks(shape: ShapeClass, hardware: Hardware, aligned: bool) -> Blocks:
    """Return blocks that compile and run for this shape on any device.

    Args:
        hardware: the device; tiles shrink until there is one for more than half of its multiprocessors.
        aligned: the large matrices can be loaded by vectorised, asynchronous copies. Otherwise elements are addressed
            one by one, which takes registers, so tiles are smaller.
    """
    wide = shape.dtype == "float32"  # FMA or tf32, and twice the shared memory per element: smaller tiles
    if shape.op in LAYER_OPS:
        pointers = pointer_blocks(shape, hardware, aligned)
        if wide and hardware.capability >= 80:
            # In float32 torch's matmul is nearly four times as fast as the kernel, on an H200.
            return replace(pointers, design="algebra_first")
        return _hopper_blocks(shape, hardware, wide, aligned) or pointers
    if shape.op in PROJECTION_OPS:
        return _filling(_projection_blocks(shape, hardware, wide, aligned), shape, hardware)
    if shape.op == "side_product":
        return _side_blocks(shape, hardware, wide, aligned)
    if shape.op == "output_gradient":
        return _output_gradient_blocks(shape, hardware, wide, aligned)
    if shape.op == "factor_gradient":
        return _gradient_blocks(shape, wide)
    return _fold_blocks(shape, wide, aligned)


def pointer_blocks(shape: ShapeClass, hardware: Hardware, aligned: bool) -> MatmulBlocks:
    """Return the default blocks of a layer without tensor descriptors: their design is one of POINTER_DESIGNS."""
    blocks = _filling(_matmul_blocks(shape, hardware, shape.dtype == "float32", aligned), shape, hardware)
    design = "tile_two_launch" if _side_goes_first(shape, blocks.block_n, hardware) else "tile"
    # The block of a side product that is loaded takes registers beside the accumulator: 64 modules would spill.
    block_r = min(blocks.block_r, 32) if design in SIDE_FIRST else blocks.block_r
    return replace(blocks, design=design, block_r=block_r)


def _matmul_blocks(shape: ShapeClass, hardware: Hardware, wide: bool, aligned: bool) -> MatmulBlocks:
    m, n, r = shape.m, shape.d_out, shape.r
    if wide:
        return MatmulBlocks("tile", tile(m, 64), tile(n, 64), 16, 16, 8, 4 if aligned else 8, 3)
    if not aligned:
        return MatmulBlocks("tile", tile(m, 64), tile(n, 64), 32, tile(r, 32), 8, 8, 3)
    block_m, block_n = tile(m, 128), tile(n, 128)
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    if hardware.has_tma:  # these multiply from shared memory and have much of it; sm_120 has less than half as much
        return MatmulBlocks("tile", block_m, block_n, 64, tile(r, 64), 8, warps, 3)
    return MatmulBlocks("tile", block_m, block_n, 32, tile(r, 32), 8, warps, 3)


def _projection_blocks(shape: ShapeClass, hardware: Hardware, wide: bool, aligned: bool) -> MatmulBlocks:
    m, n, r = shape.m, shape.d_out, shape.r
    if wide:
        most, warps = (64, 4) if aligned else (32, 8)
        return MatmulBlocks("tile", tile(m, most), tile(n, 64), 16, 16, 8, warps, 2)
    if not aligned:
        return MatmulBlocks("tile", tile(m, 64), tile(n, 64), 32, tile(r, 32), 8, 8, 3)
    block_m, block_n, block_r = tile(m, 128), tile(n, 128), tile(r, 32)
    if hardware.has_tma:
        return MatmulBlocks("tile", block_m, block_n, 64, block_r, 8, 8 if block_m * block_n >= 128 * 128 else 4, 3)
    return MatmulBlocks("tile", block_m, block_n, 32, block_r, 8, 8 if block_m * block_n >= 64 * 128 else 4, 3)


def _filling(blocks: MatmulBlocks, shape: ShapeClass, hardware: Hardware) -> MatmulBlocks:
    """Halve the tile's longer side as long as twice the tiles are still at most one per multiprocessor."""
    block_m, block_n = blocks.block_m, blocks.block_n
    while 2 * -(-shape.m // block_m) * -(-shape.d_out // block_n) <= hardware.multiprocessors:
        if block_n >= block_m and block_n > 32:
            block_n //= 2
        elif block_m > 32:
            block_m //= 2
        else:
            break
    if (block_m, block_n) != (blocks.block_m, blocks.block_n) and blocks.block_k > 16:
        blocks = replace(blocks, num_warps=4)
    if hardware.has_tma and block_m == 16 and blocks.block_k == 64:
        # With few rows the weight's memory traffic is the limit: a larger block_k keeps more loads in flight.
        blocks = replace(blocks, block_k=128)
    return replace(blocks, block_m=block_m, block_n=block_n)


def _hopper_blocks(shape: ShapeClass, hardware: Hardware, wide: bool, aligned: bool) -> MatmulBlocks | None:
    """Return blocks of a persistent kernel with tensor descriptors if large tiles keep an sm_90 busy, else None.

    For a plain matmul Triton's authors found such a kernel 13 % faster than a persistent one with pointer loads, on an
    H100 in fp16 at M = N = 8192, K = 4096 (triton-lang/triton, pull request 5461). The side product goes first: on an
    H200 recomputing it in every tile takes 17 % longer at 4096², R 16.
    """
    if wide or not aligned or not hardware.is_hopper or shape.m <= 64:  # 64 rows fill only half a tile
        return None
    tiles = -(-shape.m // 128) * -(-shape.d_out // 256)
    places = -(-tiles // hardware.multiprocessors) * hardware.multiprocessors  # tile slots in all waves
    if 3 * tiles < 2 * places:
        return None
    return MatmulBlocks("two_launch", 128, 256, 64, tile(shape.r, 32), 8, 8, 3)


def _side_goes_first(shape: ShapeClass, block_n: int, hardware: Hardware) -> bool:
    """Say whether a separate launch for the side product costs less than recomputing it in every tile.

    Recomputing costs 2·m·d_in·r operations in each column of tiles, which is block_n wide; a separate launch reads the
    input's m·d_in elements once more. GPUs do about 200 operations in half precision (30 in fp32) in the time of one
    byte. The launch must also have enough rows to fill the device.
    """
    recomputed = shape.r * -(-shape.d_out // block_n)
    wide = shape.dtype == "float32"
    # In float32 more than 16 modules, loaded 16 at a time, would spill.
    dearer = (recomputed >= 64 and shape.r <= 16) if wide else recomputed >= 192
    return dearer and shape.m >= 32 * hardware.multiprocessors


def _side_blocks(shape: ShapeClass, hardware: Hardware, wide: bool, aligned: bool) -> SideBlocks:
    block_r = tile(shape.r, 32 if wide else 64)
    block_m, programs_each = tile(shape.m, 32 if wide else 64), -(-shape.r // block_r)
    while block_m > 16 and 2 * -(-shape.m // block_m) * programs_each <= hardware.multiprocessors:
        block_m //= 2
    # One or two programs per multiprocessor read the input, and each needs 32 KiB of loads in flight to saturate 4 TB/s
    # of memory bandwidth. More modules, or unaligned loads, would spill with block_k = 128.
    block_k = 128 if hardware.has_tma and aligned and shape.r <= 32 else 64
    return SideBlocks(block_m, 32 if wide else block_k, block_r, 4, 3)


def _gradient_blocks(shape: ShapeClass, wide: bool) -> GradientBlocks:
    return GradientBlocks(
        32 if wide else 64, tile(shape.d_in, 128), tile(shape.r, 32 if wide else 64), 2, 4, 2 if wide else 3
    )


def _output_gradient_blocks(shape: ShapeClass, hardware: Hardware, wide: bool, aligned: bool) -> OutputGradientBlocks:
    if wide or not aligned:
        return OutputGradientBlocks(
            32 if wide else 64, tile(shape.d_in, 64), tile(shape.r, 32 if wide else 64), 2, 4, 2 if wide else 3
        )
    # Every column chunk stores partial sums of dS: with many modules, a single read of dY only pays with wide chunks.
    roomy = shared_bytes(hardware.capability) >= 160_000
    block_n = tile(shape.d_in, 256 if shape.r > 32 and roomy else 128)
    return OutputGradientBlocks(64, block_n, tile(shape.r, 64), 2, 8 if block_n == 256 else 4, 3)


def _fold_blocks(shape: ShapeClass, wide: bool, aligned: bool) -> FoldBlocks:
    n, k, r = shape.d_out, shape.d_in, shape.r
    if not aligned:
        return FoldBlocks(tile(n, 32), tile(k, 64), 16, 4, 2)
    if wide:
        return FoldBlocks(tile(n, 32), tile(k, 128), 16, 4, 2)
    # Four such programs fit on a multiprocessor of sm_90 and keep 64 KiB of loads of W in flight.
    return FoldBlocks(tile(n, 64), tile(k, 128), tile(r, 64), 4, 2)
