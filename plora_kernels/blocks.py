"""Block sizes of the kernels: what they are, a safe choice for any device, and what a tuner may try.

Plain data and host arithmetic: no Triton, no device query beyond what a caller passes. Every default fits the shared
memory of sm_80 (163 KiB a block) and sm_90 and compiles without a register spill; a test holds that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

# How the forward and dX reach s · side · up, the low-rank part of an output tile:
#   tile         one launch, pointer loads, the side product recomputed in every tile; any shape, any device
#   persistent   the same in a persistent launch fed by tensor descriptors (TMA)
#   two_launch   the side product first, by a launch of its own; then persistent tiles that read it. In the backward
#                that first launch takes dS and dB from one read of dY
#   one_launch   side tiles first, then output tiles that wait for them, in one persistent launch
#   algebra      the side product first, torch's own matmul, and the low-rank part added in place: y is read and written
#                once more and half precision rounded once more, but where that is fastest it is
KERNEL_DESIGNS = ("tile", "persistent", "two_launch", "one_launch")
DESIGNS = (*KERNEL_DESIGNS, "algebra")

OPS = ("forward", "input_gradient", "side_product", "output_gradient", "factor_gradient", "fold")


@dataclass(frozen=True)
class MatmulBlocks:
    """Forward and dX: out tile (block_m, block_n), depth block_k, modules block_r at a time, by `design`."""

    design: str
    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SideBlocks:
    """The side product alone: block_m rows and block_r modules a program, depth block_k."""

    block_m: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class OutputGradientBlocks:
    """dS and dB from one read of dY: block_m rows a step, block_n columns a program, rows cut into `splits` parts."""

    block_m: int
    block_n: int
    block_r: int
    splits: int
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


Blocks = MatmulBlocks | SideBlocks | OutputGradientBlocks | GradientBlocks | FoldBlocks

KINDS: dict[str, type] = {
    "forward": MatmulBlocks,
    "input_gradient": MatmulBlocks,
    "side_product": SideBlocks,
    "output_gradient": OutputGradientBlocks,
    "factor_gradient": GradientBlocks,
    "fold": FoldBlocks,
}


@dataclass(frozen=True)
class ShapeClass:
    """What blocks are chosen by: the kernel and the sizes of what it works on.

    `op` is one of OPS. The main product is (m, d_in) · (d_in, d_out): d_in = K and d_out = N in the forward, the other
    way round for dX. A side product has d_out = r. A factor gradient sums m rows of d_in columns into (r, d_in), the
    output gradient m rows of d_in = N columns. A fold has m = d_out = N and d_in = K. r counts module places.
    """

    op: str
    dtype: str
    m: int
    d_in: int
    d_out: int
    r: int


def tile(size: int, most: int) -> int:
    """Return the smallest power of two ≥ size, held to 16 … most (a tl.dot axis is at least 16)."""
    return min(most, max(16, 1 << max(0, size - 1).bit_length()))


def default_blocks(shape: ShapeClass, capability: int, aligned: bool) -> Blocks:
    """Return blocks that compile and run for this shape on any device.

    Args:
        capability: 10·major + minor of a CUDA device (90 for sm_90); 0 for any other.
        aligned: the large matrices load in wide, asynchronous pieces. Where one does not, its elements are addressed
            one by one, which takes registers: tiles are smaller.
    """
    wide = shape.dtype == "float32"  # through FMA or tf32: twice the shared memory an element, smaller tiles
    if shape.op in ("forward", "input_gradient"):
        return _matmul_blocks(shape, capability, wide, aligned)
    if shape.op == "side_product":
        return SideBlocks(
            tile(shape.m, 32 if wide else 64), 32 if wide else 64, tile(shape.r, 32 if wide else 64), 4, 3
        )
    if shape.op == "output_gradient":
        return _output_gradient_blocks(shape, wide, aligned)
    if shape.op == "factor_gradient":
        return _gradient_blocks(shape, wide)
    return _fold_blocks(shape, wide, aligned)


def _matmul_blocks(shape: ShapeClass, capability: int, wide: bool, aligned: bool) -> MatmulBlocks:
    m, n, r = shape.m, shape.d_out, shape.r
    if wide:
        return MatmulBlocks("tile", tile(m, 64), tile(n, 64), 16, 16, 8, 4 if aligned else 8, 3)
    if not aligned:
        return MatmulBlocks("tile", tile(m, 64), tile(n, 64), 32, tile(r, 32), 8, 8, 3)
    block_m, block_n = tile(m, 128), tile(n, 128)
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    if 90 <= capability < 120:  # sm_90 and sm_100 multiply from shared memory; sm_120 has less than half of it
        return MatmulBlocks("tile", block_m, block_n, 64, tile(r, 64), 8, warps, 3)
    return MatmulBlocks("tile", block_m, block_n, 32, tile(r, 32), 8, warps, 3)


def _splits(rows: int, programs: int) -> int:
    """Return into how many parts to cut the rows, given the programs there are without a cut.

    About 256 programs keep a large GPU busy; fewer rows a part than 512 would make the second pass the longer one.
    """
    return max(1, min(-(-256 // programs), -(-rows // 512)))


def _gradient_blocks(shape: ShapeClass, wide: bool) -> GradientBlocks:
    block_d = tile(shape.d_in, 128)
    programs = -(-shape.d_in // block_d) * -(-shape.r // 64)
    return GradientBlocks(
        32 if wide else 64, block_d, tile(shape.r, 32 if wide else 64), _splits(shape.m, programs), 4, 3
    )


def _output_gradient_blocks(shape: ShapeClass, wide: bool, aligned: bool) -> OutputGradientBlocks:
    block_n = tile(shape.d_in, 64 if wide or not aligned else 128)
    block_r = tile(shape.r, 32 if wide else 64)
    programs = -(-shape.d_in // block_n) * -(-shape.r // block_r)
    return OutputGradientBlocks(32 if wide else 64, block_n, block_r, _splits(shape.m, programs), 4, 2 if wide else 3)


def _fold_blocks(shape: ShapeClass, wide: bool, aligned: bool) -> FoldBlocks:
    n, k, r = shape.d_out, shape.d_in, shape.r
    if not aligned:
        return FoldBlocks(tile(n, 32), tile(k, 64), 16, 4, 2)
    if wide:
        return FoldBlocks(tile(n, 32), tile(k, 128), 16, 4, 2)
    # Four such programs share a multiprocessor of sm_90 and keep 64 KiB of W on its way.
    return FoldBlocks(tile(n, 64), tile(k, 128), tile(r, 64), 4, 2)


def candidates(shape: ShapeClass, capability: int) -> tuple[Blocks, ...]:
    """Return the blocks worth measuring for an aligned shape, the default first, without repeats.

    What would overflow the shared memory of the device is left out by estimate; what is left may still fail to compile.
    """
    default = default_blocks(shape, capability, aligned=True)
    return tuple(dict.fromkeys((default, *_variants(shape, capability))))


def _shared_bytes(capability: int) -> int:
    """Return the shared memory a block of programs may take, less what the compiler keeps for itself.

    sm_90, sm_100 and sm_103 have 227 KiB, sm_80 and sm_87 163, sm_86, sm_89 and sm_12x 99; AMD's gfx942 (0) has 64.
    """
    if capability in (90, 100, 103):
        return 227_000
    if capability in (80, 87):
        return 160_000
    return 99_000 if capability > 80 else 64_000


def _variants(shape: ShapeClass, capability: int) -> Iterator[Blocks]:
    limit = min(200_000, _shared_bytes(capability))
    itemsize = 4 if shape.dtype == "float32" else 2
    if shape.op in ("forward", "input_gradient"):
        yield from _matmul_variants(shape, capability, itemsize)
    elif shape.op == "side_product":
        for block_m, block_k, stages in product((16, 32, 64, 128), (64, 128), (3, 4, 5)):
            if block_m <= tile(shape.m, 128) and itemsize * block_k * (block_m + 64) * stages <= limit:
                yield SideBlocks(block_m, block_k, tile(shape.r, 64), 4, stages)
    elif shape.op in ("output_gradient", "factor_gradient"):
        yield from _gradient_variants(shape, capability, itemsize)
    else:
        default = default_blocks(shape, capability, aligned=True)
        assert isinstance(default, FoldBlocks)
        for block_n, block_k, warps in product((16, 32, 64, 128), (64, 128, 256), (4, 8)):
            if block_n <= tile(shape.d_out, 128) and block_k <= tile(shape.d_in, 256) and block_n * block_k <= 16384:
                yield replace(default, block_n=block_n, block_k=block_k, num_warps=warps)


def _matmul_variants(shape: ShapeClass, capability: int, itemsize: int) -> Iterator[MatmulBlocks]:
    default = default_blocks(shape, capability, aligned=True)
    assert isinstance(default, MatmulBlocks)
    yield replace(default, design="algebra")
    designs = KERNEL_DESIGNS if 90 <= capability < 120 else ("tile",)
    tiles = (
        (16, 32),
        (16, 64),
        (16, 128),
        (32, 128),
        (64, 64),
        (64, 128),
        (128, 64),
        (128, 128),
        (64, 256),
        (128, 256),
    )
    for design, (block_m, block_n), block_k, stages in product(designs, tiles, (32, 64, 128), (2, 3, 4, 5)):
        if block_m > tile(shape.m, 128) or block_n > tile(shape.d_out, 256) or (block_m < 64 and design != "tile"):
            continue
        block_r = tile(shape.r, 64)
        side = block_r if design in ("tile", "persistent") else 0
        if itemsize * block_k * (block_m + block_n + side) * stages > _shared_bytes(capability):
            continue
        if block_k * itemsize < 64:
            continue
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        yield MatmulBlocks(design, block_m, block_n, block_k, block_r, 8, warps, stages)


def _gradient_variants(shape: ShapeClass, capability: int, itemsize: int) -> Iterator[Blocks]:
    default = default_blocks(shape, capability, aligned=True)
    assert isinstance(default, OutputGradientBlocks | GradientBlocks)
    for block_m, columns, splits, stages in product((32, 64, 128), (64, 128, 256), (1, 2, 4, 8, 16, 32), (2, 3, 4)):
        if columns > tile(shape.d_in, 256) or splits > max(1, shape.m // 256):
            continue
        if itemsize * block_m * (columns + default.block_r) * stages > _shared_bytes(capability):
            continue
        changed = {"block_m": block_m, "splits": splits, "num_stages": stages, "num_warps": 4 if columns < 256 else 8}
        if isinstance(default, GradientBlocks):
            yield replace(default, block_d=columns, **changed)
        else:
            yield replace(default, block_n=columns, **changed)
