"""Block sizes of the kernels, and the shared memory they take.

This file holds plain data and host arithmetic. It does not import Triton, and callers pass what it needs to know about
a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from plora_kernels.errors import ConfigError

# The designs: variants of the algorithm by which the forward and dX add s · side · up, the low-rank part, to an output
# tile. The side product is S = D(x) Aᵀ or dS = dY B (`kernels/side_product.py`).
#   tile             one launch with pointer loads; every tile recomputes the side product; any shape, any device
#   tile_two_launch  a first launch computes the side product, a second one the tiles, which load it. In the backward
#                    the first launch computes dS and dB from one read of dY
#   persistent       as tile, but a persistent kernel with tensor descriptors (TMA)
#   two_launch       as tile_two_launch, but the second launch is the persistent kernel
#   one_launch       one persistent launch: all programs compute side tiles first, then output tiles, which wait for the
#                    side tiles of their rows
#   drawn            as one_launch, but only the programs with one output tile fewer than the others start with side
#                    tiles; a program that would wait for a side tile first computes those that no program has taken
#   algebra          the side product, then torch's own matmul, then the low-rank part added in place. y is read and
#                    written once more, and half precision is rounded once more; at some shapes it is still the fastest
#   algebra_first    as algebra, but torch's matmul is added in place to the low-rank part
POINTER_DESIGNS = ("tile", "tile_two_launch")
PERSISTENT_DESIGNS = ("persistent", "two_launch", "one_launch", "drawn")
ALGEBRA_DESIGNS = ("algebra", "algebra_first")
KERNEL_DESIGNS = (*POINTER_DESIGNS, *PERSISTENT_DESIGNS)
DESIGNS = (*KERNEL_DESIGNS, *ALGEBRA_DESIGNS)
# Designs that start with a launch for the side product. In the backward that launch computes dB as well.
SIDE_FIRST = ("tile_two_launch", "two_launch", *ALGEBRA_DESIGNS)
# Designs that compute the side product in the launch of the output tiles and pass it on through global memory.
SIDE_WITHIN = ("one_launch", "drawn")

# The shared memory beside a persistent program of 128×256 tiles on sm_90, which takes 176 KiB of 228; each program
# takes another one for itself.
ROOM_BYTES = 48 * 1024

LAYER_OPS = ("forward", "input_gradient")
PROJECTION_OPS = ("projections_forward", "projections_input_gradient")
OPS = (*LAYER_OPS, "side_product", "output_gradient", "factor_gradient", "fold", *PROJECTION_OPS)


@dataclass(frozen=True)
class MatmulBlocks:
    """Forward and dX: output tile (block_m, block_n), K steps of block_k, block_r modules at a time, by `design`.

    The kernels of projections that share their input have the design "tile". Persistent designs have `resident`
    programs per multiprocessor. If the side product has its own launch, two flags ask for programmatic dependent
    launch: `dependent` lets this launch run beside that of the side product, `gradient_beside` that of dA beside this
    one of dX, and both together that of dB too. The blocks of those are `beside_product`'s.

    Raises ConfigError for an unknown design, as an older table may name.
    """

    design: str
    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int
    resident: int = 1
    dependent: bool = False
    gradient_beside: bool = False

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise ConfigError(f"design is {self.design!r}; it must be one of {', '.join(DESIGNS)}")


@dataclass(frozen=True)
class SideBlocks:
    """The side product alone: block_m rows and block_r modules per program, K steps of block_k."""

    block_m: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class OutputGradientBlocks:
    """dS and dB from one read of dY: block_m rows per step, block_n columns per program.

    The rows are split such that every multiprocessor gets `waves` programs: see `row_splits`.
    """

    block_m: int
    block_n: int
    block_r: int
    waves: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradientBlocks:
    """Tiles of dA and dB: block_r modules × block_d columns, block_m rows per step; rows are split by `row_splits`."""

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


S = TypeVar("S", SideBlocks, GradientBlocks)
Blocks = MatmulBlocks | SideBlocks | OutputGradientBlocks | GradientBlocks | FoldBlocks
B = TypeVar("B", bound=Blocks)

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
    """The key by which blocks are chosen: the kernel, and the dtype and sizes of its operands.

    `op` is one of OPS. The main product is (m, d_in) · (d_in, d_out): d_in = K and d_out = N in the forward, the other
    way round for dX. A side product has d_out = r. A factor gradient sums m rows of d_in columns into (r, d_in), the
    output gradient m rows of d_in = N columns. A fold has m = d_out = N and d_in = K. For projections, N is the sum of
    their widths and r their largest rank. r is the number of columns of the side product: R without an index, else the
    entries of the index.
    """

    op: str
    dtype: str
    m: int
    d_in: int
    d_out: int
    r: int


@dataclass(frozen=True)
class Hardware:
    """The device properties that blocks depend on.

    `capability` is 10·major + minor of a CUDA device (90 for sm_90), and 0 for others.
    """

    capability: int
    multiprocessors: int

    @property
    def has_tma(self) -> bool:
        """Say whether matrix units read operands from shared memory, which TMA loads fill: sm_90 to sm_11x."""
        return 90 <= self.capability < 120

    @property
    def is_hopper(self) -> bool:
        """Say whether the device is an sm_90."""
        return 90 <= self.capability < 100

    @property
    def has_dependent_launches(self) -> bool:
        """Say whether a launch may begin before the one it depends on has ended: CUDA devices from sm_90 on."""
        return self.capability >= 90


def tile(size: int, most: int) -> int:
    """Return the smallest power of two ≥ size, clamped to 16 … most (an axis of tl.dot is at least 16)."""
    return min(most, max(16, 1 << max(0, size - 1).bit_length()))


def beside_product(blocks: S, dtype: str, *, wide_factors: bool = False) -> S:
    """Return blocks of a side product, or of dA and dB, that leave a multiprocessor room for a program of the product.

    Their tile is 64×64, with as many stages as the room allows, four at most.
    """
    size = {"block_k" if isinstance(blocks, SideBlocks) else "block_d": 64}
    blocks = replace(blocks, block_m=64, num_warps=4, num_stages=4, **size)
    return _with_fewer_stages(blocks, dtype, ROOM_BYTES, wide_factors)


def for_wide_factors(blocks: B, shape: ShapeClass, capability: int) -> B:
    """Return blocks for factors in fp32 beside the half precision of `shape`, given those for factors in that.

    Tiles of factors that a main loop loads take more shared memory, so there may be fewer stages. fp32 numbers take
    more registers, so a large tile adds fewer of many modules at a time, and a fold, which multiplies each of them in
    parts, has smaller tiles: 64 columns, if matrix units read from shared memory, else those of an fp32 weight. Where
    Hopper then adds many ranks at a time to 64×64 elements, a later GPU, whose compiler would spill, adds 16 to
    64×128. A large tile of B in registers is made smaller and spread over more warps.
    """
    from_shared_memory = Hardware(capability, 1).has_tma
    if isinstance(blocks, FoldBlocks):
        if from_shared_memory and blocks.block_n >= 64:
            blocks = replace(blocks, block_n=64)
            if not Hardware(capability, 1).is_hopper:
                return replace(blocks, block_k=min(blocks.block_k, 128), block_r=min(blocks.block_r, 16))
            return replace(blocks, block_k=min(blocks.block_k, 64 if blocks.block_r > 16 else 128))
        return replace(blocks, block_n=min(blocks.block_n, 32), block_k=min(blocks.block_k, 128), block_r=16)
    if isinstance(blocks, MatmulBlocks):
        large, many = (128 * 256, 64) if from_shared_memory else (128 * 128, 32)
        if blocks.block_m * blocks.block_n >= large and shape.r > many:
            blocks = replace(blocks, block_r=min(blocks.block_r, 16))
    if isinstance(blocks, OutputGradientBlocks) and not from_shared_memory and blocks.block_n * blocks.block_r >= 8192:
        blocks = replace(blocks, block_n=min(blocks.block_n, 128), num_warps=8)
    return _with_fewer_stages(blocks, shape.dtype, shared_bytes(capability), True)


def _with_fewer_stages(blocks: B, dtype: str, limit: int, wide_factors: bool) -> B:
    """Return blocks with so many stages that they take at most `limit` bytes of shared memory, or with one."""
    stages = blocks.num_stages
    while stages > 1 and staged_bytes(replace(blocks, num_stages=stages), dtype, wide_factors=wide_factors) > limit:
        stages -= 1
    return replace(blocks, num_stages=stages)


def shared_bytes(capability: int) -> int:
    """Return the shared memory in bytes that a program may take, less what the compiler uses for itself.

    sm_90, sm_10x and sm_110 have 227 KiB; sm_80 and sm_87 have 163; sm_86, sm_89 and sm_12x have 99; AMD's gfx942
    (capability 0) has 64, which is assumed for older GPUs too.
    """
    if 90 <= capability < 120:
        return 227_000
    if capability in (80, 87):
        return 160_000
    return 99_000 if capability > 80 else 64_000


def staged_bytes(blocks: Blocks, dtype: str, *, wide_factors: bool = False) -> int:
    """Return the bytes of the tiles in flight over all pipeline stages: a lower bound of a program's shared memory.

    Persistent designs need in addition half an output tile, which is stored while the next loads arrive. With
    `wide_factors` the factors are fp32 beside a half-precision `dtype`: in flight are then fp32 tiles of them, and one
    that is rounded.
    """
    itemsize = 4 if dtype == "float32" else 2
    factors, beside = 0, 0  # elements of a tile of a factor, and of other tiles that are not loaded in stages
    match blocks:
        case MatmulBlocks(design="algebra" | "algebra_first") | FoldBlocks():
            return 0
        case MatmulBlocks():
            elements = blocks.block_k * (blocks.block_m + blocks.block_n)
            factors = blocks.block_k * blocks.block_r if blocks.design in ("tile", "persistent") else 0
            beside = blocks.block_m * blocks.block_n // 2 if blocks.design in PERSISTENT_DESIGNS else 0
        case SideBlocks():
            elements, factors = blocks.block_k * blocks.block_m, blocks.block_k * blocks.block_r
        case OutputGradientBlocks():
            elements = blocks.block_m * (blocks.block_n + blocks.block_r)
        case GradientBlocks():
            elements = blocks.block_m * (blocks.block_d + blocks.block_r)
    of_factors = 4 * (blocks.num_stages - 1) + itemsize if wide_factors else itemsize * blocks.num_stages
    return itemsize * (elements * blocks.num_stages + beside) + of_factors * factors


def row_splits(rows: int, width: int, programs: int, block_m: int, waves: int, multiprocessors: int) -> int:
    """Return the number of parts to split a gradient's rows into; a second launch adds the parts' partial sums.

    The splits give every multiprocessor `waves` programs, where `programs` is their number without a split. A part has
    at least block_m rows, and 16 rows for each of `width` modules. Writing and reading back its fp32 partial sums then
    moves at most a quarter of the bytes that the part reads in half precision.
    """
    wanted = -(-waves * multiprocessors // programs)
    return max(1, min(wanted, rows // max(block_m, 16 * width)))
