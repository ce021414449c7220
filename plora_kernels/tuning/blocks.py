"""Block sizes of the kernels: what they are, and what memory they take.

Plain data and host arithmetic: no Triton, no device query beyond what a caller passes.
"""

from __future__ import annotations

from dataclasses import dataclass

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
PERSISTENT_DESIGNS = ("persistent", "two_launch", "one_launch", "drawn", "specialised")
ALGEBRA_DESIGNS = ("algebra", "algebra_first")
KERNEL_DESIGNS = (*POINTER_DESIGNS, *PERSISTENT_DESIGNS)
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
            beside = blocks.block_m * blocks.block_n // 2 if blocks.design in PERSISTENT_DESIGNS else 0
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


def row_splits(rows: int, width: int, programs: int, block_m: int, waves: int, multiprocessors: int) -> int:
    """Return into how many parts to cut the rows of a gradient, each of which the second pass reads once more.

    As many as give every multiprocessor `waves` programs, given the programs there are without a cut. A part has at
    least block_m rows and 16 for each of `width` modules: its sum in fp32 then is no more than a quarter of what the
    part reads in half precision.
    """
    wanted = -(-waves * multiprocessors // programs)
    return max(1, min(wanted, rows // max(block_m, 16 * width)))
