"""Block sizes that represent each design of the kernels, in checks and audits."""

from __future__ import annotations

from dataclasses import dataclass

from plora_kernels.tuning.blocks import Blocks, Hardware, MatmulBlocks, ShapeClass
from plora_kernels.tuning.candidates import candidates


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer; `indexed`: the modules are named by an index, as after `select`."""

    m: int
    k: int
    n: int
    r: int
    indexed: bool = False


# Every design is compiled with the candidates nearest to these tiles: those of half precision are known to be fast on
# Hopper; in float32 products go through FMA, where more than this spills, or through tf32 ("tf32").
DESIGN_TILES = {"float32": (64, 64, 16), "tf32": (64, 128, 32)}


HALF_PRECISION_TILES = (128, 256, 64)


def design_blocks(design: str, shape: Shape, dtype: str, hardware: Hardware) -> dict[str, Blocks]:
    """Return a design's blocks for the forward and dX, without overlap; empty if it is not a candidate.

    `dtype` is a name of torch's or "tf32", float32 by that precision.
    """
    return next(iter(design_ways(design, shape, dtype, hardware).values()), {})


def design_ways(design: str, shape: Shape, dtype: str, hardware: Hardware) -> dict[str, dict[str, Blocks]]:
    """Return a design's blocks for the forward and dX by the kind of overlap, the one without overlap first.

    All have the same tiles. If the forward is a dependent launch, dX also lets dA begin beside itself.
    """
    tiles, name = DESIGN_TILES.get(dtype, HALF_PRECISION_TILES), "float32" if dtype == "tf32" else dtype
    found: dict[str, dict[str, Blocks]] = {}
    for op, d_in, d_out in (("forward", shape.k, shape.n), ("input_gradient", shape.n, shape.k)):
        known = candidates(ShapeClass(op, name, shape.m, d_in, d_out, shape.r), hardware)
        same = [blocks for blocks in known if isinstance(blocks, MatmulBlocks) and blocks.design == design]
        nearest = min((_distance(blocks, tiles) for blocks in same), default=None)
        for blocks in same:
            if _distance(blocks, tiles) == nearest and (op == "forward" or blocks.dependent == blocks.gradient_beside):
                found.setdefault(_way(blocks), {}).setdefault(op, blocks)
    return {way: both for way, both in found.items() if len(both) == 2}


def _way(blocks: MatmulBlocks) -> str:
    """Return a description of a design and of how its programs and launches share multiprocessors."""
    words = [blocks.design]
    words += [f"{blocks.resident} resident"] if blocks.resident > 1 else []
    return " ".join([*words, *(["dependent"] if blocks.dependent else [])])


def _distance(blocks: MatmulBlocks, tiles: tuple[int, int, int]) -> tuple[int, int]:
    sizes = (blocks.block_m, blocks.block_n, blocks.block_k)
    return sum(abs(size - wanted) for size, wanted in zip(sizes, tiles, strict=True)), abs(blocks.num_stages - 3)
