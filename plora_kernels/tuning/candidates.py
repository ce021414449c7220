"""The block sizes that a tuner tries on a device: those that fit its shared memory, by design and tile size.

Plain host arithmetic: this file compiles and measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from plora_kernels.tuning.blocks import (
    ALGEBRA_DESIGNS,
    KERNEL_DESIGNS,
    LAYER_OPS,
    PERSISTENT_DESIGNS,
    POINTER_DESIGNS,
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
    staged_bytes,
    tile,
)
from plora_kernels.tuning.defaults import default_blocks

# (block_m, block_n) of an output tile.
TILES = ((16, 32), (16, 64), (16, 128), (32, 128), (64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256))
# The largest float32 tile in elements: with FMA instructions a larger one spills kilobytes of registers and takes half
# a minute to compile.
WIDE_TILE = 64 * 128


def candidates(shape: ShapeClass, hardware: Hardware) -> tuple[Blocks, ...]:
    """Return the blocks worth measuring for an aligned shape, the default first, without repeats.

    Blocks that would exceed the device's shared memory by the estimate of `staged_bytes` are left out. The others may
    still fail to compile.
    """
    default, limit = default_blocks(shape, hardware, aligned=True), shared_bytes(hardware.capability)
    fitting = (blocks for blocks in _variants(shape, hardware, default) if staged_bytes(blocks, shape.dtype) <= limit)
    return tuple(dict.fromkeys((default, *fitting)))


def _variants(shape: ShapeClass, hardware: Hardware, default: Blocks) -> Iterator[Blocks]:
    match default:
        case MatmulBlocks():
            yield from _matmul_variants(shape, hardware, default)
        case SideBlocks():
            for block_m, block_k, stages in product((16, 32, 64, 128), (64, 128), (3, 4, 5)):
                if block_m <= tile(shape.m, 128):
                    yield SideBlocks(block_m, block_k, tile(shape.r, 64), 4, stages)
        case OutputGradientBlocks() | GradientBlocks():
            yield from _gradient_variants(shape, default)
        case FoldBlocks():
            for block_n, block_k, warps in product((16, 32, 64, 128), (64, 128, 256), (4, 8)):
                fits = block_n <= tile(shape.d_out, 128) and block_k <= tile(shape.d_in, 256)
                if fits and block_n * block_k <= 16384:
                    yield replace(default, block_n=block_n, block_k=block_k, num_warps=warps)


def _matmul_variants(shape: ShapeClass, hardware: Hardware, default: MatmulBlocks) -> Iterator[MatmulBlocks]:
    designs: tuple[str, ...] = ("tile",)
    if shape.op in LAYER_OPS:
        yield from (replace(default, design=design) for design in ALGEBRA_DESIGNS)
        designs = KERNEL_DESIGNS if hardware.has_tma else POINTER_DESIGNS
    wide_dtype = shape.dtype == "float32"
    narrow, wide = tile(shape.r, 32), tile(shape.r, 64 if shape.op in LAYER_OPS else 32)
    depths = (16, 32, 64, 128) if wide_dtype else (32, 64, 128)  # block_k of at least 64 contiguous bytes
    for design, (block_m, block_n), block_k, stages in product(designs, TILES, depths, (2, 3, 4, 5)):
        if block_m > tile(shape.m, 128) or block_n > tile(shape.d_out, 256):
            continue
        if wide_dtype and block_m * block_n > WIDE_TILE:
            continue
        # A persistent program needs a large tile, if the shape has room for one, and many K columns in flight
        # (block_k · stages): `small` below leaves the others out.
        large = min(128 * 128, tile(shape.m, 128) * tile(shape.d_out, 256))
        if design in PERSISTENT_DESIGNS and not hardware.is_hopper and block_m * block_n > 128 * 128:
            continue  # sm_100 keeps accumulators in tensor memory, which more than one of these tiles may overflow
        small = block_m < 64 or (not wide_dtype and (block_m * block_n < large or block_k * stages < 192))
        if design in PERSISTENT_DESIGNS and small:
            continue
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        # The side product's block takes registers beside the accumulator. Half of its modules at a time may prevent
        # spills, and the large tiles of persistent programs have no registers left for a block wider than 32.
        halves = {tile(shape.r, 16), narrow} if design in PERSISTENT_DESIGNS else {narrow, wide}
        for block_r in sorted(halves) if design != "tile" else (wide,):
            blocks = MatmulBlocks(design, block_m, block_n, block_k, block_r, 8, warps, stages)
            yield from _persistent_variants(shape, hardware, blocks) if design in PERSISTENT_DESIGNS else (blocks,)


def _persistent_variants(shape: ShapeClass, hardware: Hardware, blocks: MatmulBlocks) -> Iterator[MatmulBlocks]:
    """Yield a persistent design with one and, if its tiles leave room, two programs per multiprocessor."""
    large = blocks.block_m * blocks.block_n > 128 * 128
    for resident in (1,) if large else (1, 2):
        yield from _beside_other_launches(shape, hardware, replace(blocks, resident=resident))


def _beside_other_launches(shape: ShapeClass, hardware: Hardware, blocks: MatmulBlocks) -> Iterator[MatmulBlocks]:
    """Yield the blocks and, if the side product has its own launch, their variants with programmatic dependent launch.

    Those overlap with the launch of the side product (`dependent`) and of dA (`gradient_beside`).
    """
    yield blocks
    # One of two programs on a multiprocessor leaves no room beside it.
    if blocks.design in SIDE_FIRST and hardware.has_dependent_launches and blocks.resident == 1:
        yield replace(blocks, dependent=True)
        if shape.op == "input_gradient":
            yield replace(blocks, gradient_beside=True)
            yield replace(blocks, dependent=True, gradient_beside=True)


def _gradient_variants(shape: ShapeClass, default: OutputGradientBlocks | GradientBlocks) -> Iterator[Blocks]:
    for block_m, columns, waves, stages in product((32, 64, 128), (64, 128, 256, 512), (1, 2, 4), (2, 3, 4)):
        if columns > tile(shape.d_in, 512) or block_m > max(32, tile(shape.m, 128)):
            continue
        changed = {"block_m": block_m, "waves": waves, "num_stages": stages, "num_warps": 4 if columns < 256 else 8}
        if isinstance(default, GradientBlocks):
            yield replace(default, block_d=columns, **changed)
        else:
            yield replace(default, block_n=columns, **changed)
