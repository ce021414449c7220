"""Block sizes of the kernels: what they are, and a safe choice for any device.

Plain data and host arithmetic: no Triton, no device query beyond what a caller passes. At the shapes of `bench.audit`
every default fits the shared memory of its devices and compiles without a register spill; a test holds that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# How the forward and dX reach s · side · up, the low-rank part of an output tile:
#   tile             one launch, pointer loads, the side product recomputed in every tile; any shape, any device
#   tile_two_launch  the side product first, by a launch of its own; then tiles that read it. In the backward that first
#                    launch takes dS and dB from one read of dY
#   persistent       as tile, in a persistent launch fed by tensor descriptors (TMA)
#   two_launch       as tile_two_launch, the tiles those of persistent
#   one_launch       side tiles first, then output tiles that wait for them, in one persistent launch
#   drawn            as one_launch, but the side tiles are made by the programs that have a tile less than the others,
#                    and by whoever would have to wait for one that nobody has begun
#   specialised      as two_launch, with warps that load and others that multiply; half precision on sm_90
#   algebra          the side product first, torch's own matmul, and the low-rank part added in place: y is read and
#                    written once more and half precision rounded once more, but where that is fastest it is
#   algebra_first    the same with the low-rank part made first and torch's matmul added to it
POINTER_DESIGNS = ("tile", "tile_two_launch")
WALKING_DESIGNS = ("persistent", "two_launch", "one_launch", "drawn", "specialised")
ALGEBRA_DESIGNS = ("algebra", "algebra_first")
KERNEL_DESIGNS = (*POINTER_DESIGNS, *WALKING_DESIGNS)
DESIGNS = (*KERNEL_DESIGNS, *ALGEBRA_DESIGNS)
# Those that start with a launch of the side product, which in the backward gives dB as well.
SIDE_FIRST = ("tile_two_launch", "two_launch", "specialised", *ALGEBRA_DESIGNS)
# Those that make the side product in the launch of the output tiles, and hand it over through memory.
SIDE_WITHIN = ("one_launch", "drawn")
# How a walking program hides what lies between two tiles, beside its stages:
#   none     not at all
#   flatten  the loads of a tile begin under the end of the one before
#   early    up, and a side product that is given, are loaded before the long product
OVERLAPS = ("none", "flatten", "early")

LAYER_OPS = ("forward", "input_gradient")
PROJECTION_OPS = ("projections_forward", "projections_input_gradient")
OPS = (*LAYER_OPS, "side_product", "output_gradient", "factor_gradient", "fold", *PROJECTION_OPS)


@dataclass(frozen=True)
class MatmulBlocks:
    """Forward and dX: out tile (block_m, block_n), depth block_k, modules block_r at a time, by `design`.

    Of projections that share their input the design is "tile". Walking designs have an `overlap`, one of OVERLAPS, and
    `resident` programs a multiprocessor. Where the side product has a launch of its own, one that is `dependent` begins
    before that has ended, and with `gradient_beside` the launch of dA begins before this one of dX has, on
    multiprocessors without a tile in the last round (programmatic dependent launch).
    """

    design: str
    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int
    overlap: str = "none"
    resident: int = 1
    dependent: bool = False
    gradient_beside: bool = False


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
    """dS and dB from one read of dY: block_m rows a step, block_n columns a program.

    The rows are cut into as many parts as give every multiprocessor `waves` programs: see `row_splits`.
    """

    block_m: int
    block_n: int
    block_r: int
    waves: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradientBlocks:
    """Tiles of dA and dB: block_r modules × block_d columns, block_m rows a step, the rows cut as by `row_splits`."""

    block_m: int
    block_d: int
    block_r: int
    waves: int
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
    "projections_forward": MatmulBlocks,
    "projections_input_gradient": MatmulBlocks,
}


@dataclass(frozen=True)
class ShapeClass:
    """What blocks are chosen by: the kernel and the sizes of what it works on.

    `op` is one of OPS. The main product is (m, d_in) · (d_in, d_out): d_in = K and d_out = N in the forward, the other
    way round for dX. A side product has d_out = r. A factor gradient sums m rows of d_in columns into (r, d_in), the
    output gradient m rows of d_in = N columns. A fold has m = d_out = N and d_in = K. Of projections, N is the sum of
    their widths and r their largest rank. r counts module places.
    """

    op: str
    dtype: str
    m: int
    d_in: int
    d_out: int
    r: int


@dataclass(frozen=True)
class Hardware:
    """What blocks depend on of a device: 10·major + minor of a CUDA device (90 for sm_90), else 0, and its size."""

    capability: int
    multiprocessors: int

    @property
    def has_tma(self) -> bool:
        """Say whether it multiplies from shared memory, which descriptors fill: sm_90 to sm_11x."""
        return 90 <= self.capability < 120

    @property
    def is_hopper(self) -> bool:
        """Say whether it is an sm_90."""
        return 90 <= self.capability < 100

    @property
    def has_dependent_launches(self) -> bool:
        """Say whether a launch may begin before the one it depends on has ended: CUDA devices from sm_90 on."""
        return self.capability >= 90


def tile(size: int, most: int) -> int:
    """Return the smallest power of two ≥ size, held to 16 … most (a tl.dot axis is at least 16)."""
    return min(most, max(16, 1 << max(0, size - 1).bit_length()))


def shared_bytes(capability: int) -> int:
    """Return the shared memory a block of programs may take, less what the compiler keeps for itself.

    sm_90 and sm_10x have 227 KiB, and so has sm_110; sm_80 and sm_87 163, sm_86, sm_89 and sm_12x 99; AMD's gfx942 (0)
    has 64.
    """
    if 90 <= capability < 120:
        return 227_000
    if capability in (80, 87):
        return 160_000
    return 99_000 if capability > 80 else 64_000


def staged_bytes(blocks: Blocks, dtype: str) -> int:
    """Return the bytes of the tiles that a program has on their way in all its stages: the least it needs shared.

    Walking designs hold half a tile of the output beside them, which is being stored while the next loads come in, and
    the tiles of side and up where these are loaded ahead.
    """
    itemsize = 4 if dtype == "float32" else 2
    match blocks:
        case MatmulBlocks(design="algebra" | "algebra_first") | FoldBlocks():
            return 0
        case MatmulBlocks():
            side = blocks.block_r if blocks.design in ("tile", "persistent") else 0
            depth = blocks.block_k + (blocks.block_r if blocks.design == "specialised" else 0)
            elements = depth * (blocks.block_m + blocks.block_n) + blocks.block_k * side
            beside = blocks.block_m * blocks.block_n // 2 if blocks.design in WALKING_DESIGNS else 0
            if blocks.overlap == "flatten":
                elements += blocks.block_r * (blocks.block_m + blocks.block_n)
            elif blocks.overlap == "early":
                beside += blocks.block_r * blocks.block_n
            return itemsize * (elements * blocks.num_stages + beside)
        case SideBlocks():
            elements = blocks.block_k * (blocks.block_m + blocks.block_r)
        case OutputGradientBlocks():
            elements = blocks.block_m * (blocks.block_n + blocks.block_r)
        case GradientBlocks():
            elements = blocks.block_m * (blocks.block_d + blocks.block_r)
    return itemsize * elements * blocks.num_stages


def default_blocks(shape: ShapeClass, hardware: Hardware, aligned: bool) -> Blocks:
    """Return blocks that compile and run for this shape on any device.

    Args:
        hardware: the device; tiles shrink until there is one for at least half of its multiprocessors.
        aligned: the large matrices load in wide, asynchronous pieces. Where one does not, its elements are addressed
            one by one, which takes registers: tiles are smaller.
    """
    wide = shape.dtype == "float32"  # through FMA or tf32: twice the shared memory an element, smaller tiles
    if shape.op in LAYER_OPS:
        return _hopper_blocks(shape, hardware, wide, aligned) or pointer_blocks(shape, hardware, aligned)
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
    """Return what `default_blocks` would be for a layer without tensor descriptors: a design of POINTER_DESIGNS."""
    blocks = _filling(_matmul_blocks(shape, hardware, shape.dtype == "float32", aligned), shape, hardware)
    design = "tile_two_launch" if _side_goes_first(shape, blocks.block_n, hardware) else "tile"
    # A side product that is read takes registers beside the tile: 64 modules of it would spill.
    block_r = min(blocks.block_r, 32) if design in SIDE_FIRST else blocks.block_r
    return replace(blocks, design=design, block_r=block_r)


def row_splits(rows: int, width: int, programs: int, block_m: int, waves: int, multiprocessors: int) -> int:
    """Return into how many parts to cut the rows of a gradient, each of which the second pass reads once more.

    As many as give every multiprocessor `waves` programs, given the programs there are without a cut. A part has at
    least block_m rows and 16 for each of `width` modules: its sum in fp32 then is no more than a quarter of what the
    part reads in half precision.
    """
    wanted = -(-waves * multiprocessors // programs)
    return max(1, min(wanted, rows // max(block_m, 16 * width)))


def _matmul_blocks(shape: ShapeClass, hardware: Hardware, wide: bool, aligned: bool) -> MatmulBlocks:
    m, n, r = shape.m, shape.d_out, shape.r
    if wide:
        return MatmulBlocks("tile", tile(m, 64), tile(n, 64), 16, 16, 8, 4 if aligned else 8, 3)
    if not aligned:
        return MatmulBlocks("tile", tile(m, 64), tile(n, 64), 32, tile(r, 32), 8, 8, 3)
    block_m, block_n = tile(m, 128), tile(n, 128)
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    if hardware.has_tma:  # sm_90 and sm_100 multiply from shared memory; sm_120 has less than half of it
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
    """Halve the tile's longer side while twice the tiles would still be no more than one a multiprocessor."""
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
        # Few rows are bound by the reading of weights: deeper steps keep more of it in flight.
        blocks = replace(blocks, block_k=128)
    return replace(blocks, block_m=block_m, block_n=block_n)


def _hopper_blocks(shape: ShapeClass, hardware: Hardware, wide: bool, aligned: bool) -> MatmulBlocks | None:
    """Return persistent tiles fed by descriptors where large tiles keep an sm_90 busy, else None.

    Triton's authors found the plain matmul so made 13 % ahead of a persistent one by pointer loads on an H100, in fp16
    at M = N = 8192, K = 4096 (triton-lang/triton, pull request 5461). Nobody has measured it here.
    """
    if wide or not aligned or not hardware.is_hopper or shape.m <= 64:  # rows that a tile would be half empty of
        return None
    tiles = -(-shape.m // 128) * -(-shape.d_out // 256)
    places = -(-tiles // hardware.multiprocessors) * hardware.multiprocessors  # of all rounds, the last one included
    if 3 * tiles < 2 * places:
        return None
    # More than sixteen modules of a side product made in the loop would spill.
    first = shape.r > 16 or _side_goes_first(shape, 256, hardware)
    return MatmulBlocks("two_launch" if first else "persistent", 128, 256, 64, tile(shape.r, 32), 8, 8, 3)


def _side_goes_first(shape: ShapeClass, block_n: int, hardware: Hardware) -> bool:
    """Say whether a read of the input costs less than a side product in every tile, block_n columns wide.

    Recomputed, it costs 2·m·d_in·r operations in each column of tiles; read, m·d_in elements once. GPUs do some 200
    operations of half precision (30 of fp32) in the time of one byte. It must also be long enough to fill the device.
    """
    recomputed = shape.r * -(-shape.d_out // block_n)
    wide = shape.dtype == "float32"
    # Of float32 more than sixteen modules, read sixteen at a time, would spill.
    dearer = (recomputed >= 64 and shape.r <= 16) if wide else recomputed >= 192
    return dearer and shape.m >= 32 * hardware.multiprocessors


def _side_blocks(shape: ShapeClass, hardware: Hardware, wide: bool, aligned: bool) -> SideBlocks:
    block_r = tile(shape.r, 32 if wide else 64)
    block_m, programs_each = tile(shape.m, 32 if wide else 64), -(-shape.r // block_r)
    while block_m > 16 and 2 * -(-shape.m // block_m) * programs_each <= hardware.multiprocessors:
        block_m //= 2
    # A read of the input by one program a multiprocessor or two, each of which must have 32 KiB on its way to keep a
    # memory of 4 TB/s busy. More modules, or lines that start anywhere, would spill.
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
    # Partial sums of dS go by column chunks: with many modules only wide chunks are worth a single read of dY.
    roomy = shared_bytes(hardware.capability) >= 160_000
    block_n = tile(shape.d_in, 256 if shape.r > 32 and roomy else 128)
    return OutputGradientBlocks(64, block_n, tile(shape.r, 64), 2, 8 if block_n == 256 else 4, 3)


def _fold_blocks(shape: ShapeClass, wide: bool, aligned: bool) -> FoldBlocks:
    n, k, r = shape.d_out, shape.d_in, shape.r
    if not aligned:
        return FoldBlocks(tile(n, 32), tile(k, 64), 16, 4, 2)
    if wide:
        return FoldBlocks(tile(n, 32), tile(k, 128), 16, 4, 2)
    # Four such programs share a multiprocessor of sm_90 and keep 64 KiB of W on its way.
    return FoldBlocks(tile(n, 64), tile(k, 128), tile(r, 64), 4, 2)
