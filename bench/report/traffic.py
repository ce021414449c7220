"""What the launches of a layer read from memory and write to it, counted: PEFT's, in-place algebra's and the kernels'.

Every launch reads each of its operands once and writes its result once; what caches keep from one launch to the next
is not counted. Operands are in half precision, unless a name says fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plora_kernels.tuning.blocks import row_splits

HALF, FULL = 2, 4  # bytes of an element
CHUNK = 128  # columns of dY of which a program makes partial sums of dS, on Hopper GPUs up to R 32
WAVES, BLOCK_M, MULTIPROCESSORS = 2, 64, 132  # how the rows of dA and dB are split on an H200


@dataclass(frozen=True)
class Launch:
    """A launch: what it computes, and the bytes of every tensor that it reads and writes."""

    name: str
    reads: Mapping[str, int]
    writes: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """All bytes, read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass(frozen=True)
class Way:
    """A way to compute something, as its launches in order, done `times` times."""

    title: str
    launches: Sequence[Launch]
    times: int = 1

    @property
    def bytes(self) -> int:
        """All bytes that the launches read and write."""
        return self.times * sum(launch.bytes for launch in self.launches)


class Shape(NamedTuple):
    """The sizes of a layer: M rows of x, K input and N output features, R modules."""

    m: int
    k: int
    n: int
    r: int


def launches_of(shape: Shape) -> Callable[[str, str, str], Launch]:
    """Return a function that makes a launch of its name and of the names of what it reads and of what it writes."""
    m, k, n, r = shape
    elements = {"x": m * k, "W": n * k, "y": m * n, "A": r * k, "B": n * r, "S": m * r, "Z": m * n, "BA": n * k}
    elements |= {f"d{name.upper()}": size for name, size in elements.items()} | {"dX'": m * k}
    sizes = {name: HALF * size for name, size in elements.items()}
    sizes |= {f"{name} fp32": FULL * size for name, size in elements.items()}
    splits_A, splits_B = (row_splits(m, r, -(-d // CHUNK), BLOCK_M, WAVES, MULTIPROCESSORS) for d in (k, n))
    sizes |= {
        "parts of dS": FULL * m * r * -(-n // CHUNK),
        "parts of dA": FULL * splits_A * r * k,
        "parts of dB": FULL * splits_B * r * n,
    }

    def launch(name: str, reads: str, writes: str) -> Launch:
        read, written = ({one: sizes[one] for one in names.split(", ")} for names in (reads, writes))
        return Launch(name, read, written)

    return launch


def forward(shape: Shape) -> list[Way]:
    """Return the ways to compute y = x Wᵀ + s·(x Aᵀ) Bᵀ, the first of them without the adapter."""
    do = launches_of(shape)
    base = do("x Wᵀ", "x, W", "y")
    return [
        Way("x Wᵀ alone", [base]),
        Way(
            "PEFT, fp32 factors",
            [
                base,
                do("x to fp32", "x", "x fp32"),
                do("S = x Aᵀ", "x fp32, A fp32", "S fp32"),
                do("Z = S Bᵀ", "S fp32, B fp32", "Z fp32"),
                do("s·Z", "Z fp32", "Z fp32"),
                do("y + s·Z", "y, Z fp32", "y fp32"),
                do("y to bf16", "y fp32", "y"),
            ],
        ),
        Way(
            "PEFT, bf16 factors",
            [
                base,
                do("S = x Aᵀ", "x, A", "S"),
                do("Z = S Bᵀ", "S, B", "Z"),
                do("s·Z", "Z", "Z"),
                do("y + s·Z", "y, Z", "y"),
            ],
        ),
        Way("in place, by torch", [base, do("S", "x, A", "S"), do("y += s·S Bᵀ", "y, S, B", "y")]),
        Way("two_launch", [do("S", "x, A", "S"), do("x Wᵀ + s·S Bᵀ", "x, W, S, B", "y")]),
        Way("tile", [do("x Wᵀ + s·(x Aᵀ) Bᵀ", "x, W, A, B", "y, S")]),
    ]


def backward(shape: Shape) -> list[Way]:
    """Return the ways to compute dX, dA and dB of it, the first of them dX without the adapter."""
    do = launches_of(shape)
    base = do("dY W", "dY, W", "dX")
    return [
        Way("dY W alone", [base]),
        Way(
            "PEFT, fp32 factors",
            [
                do("dY to fp32", "dY", "dY fp32"),
                do("to bf16", "dY fp32", "dY"),
                do("dZ = s·dY", "dY fp32", "dZ fp32"),
                do("dB", "dZ fp32, S fp32", "dB fp32"),
                do("dS", "dZ fp32, B fp32", "dS fp32"),
                do("dA", "dS fp32, x fp32", "dA fp32"),
                do("dX' = dS A", "dS fp32, A fp32", "dX' fp32"),
                do("to bf16", "dX' fp32", "dX'"),
                base,
                do("dX + dX'", "dX, dX'", "dX"),
            ],
        ),
        Way(
            "PEFT, bf16 factors",
            [
                do("dZ = s·dY", "dY", "dZ"),
                do("dB", "dZ, S", "dB"),
                do("dS", "dZ, B", "dS"),
                do("dA", "dS, x", "dA"),
                do("dX' = dS A", "dS, A", "dX'"),
                base,
                do("dX + dX'", "dX, dX'", "dX"),
            ],
        ),
        Way(
            "in place, by torch",
            [
                do("dS", "dY, B", "dS"),
                do("dB", "dY, S", "dB"),
                do("dA", "dS, x", "dA"),
                base,
                do("dX += dS A", "dX, dS, A", "dX"),
            ],
        ),
        Way(
            "two_launch",
            [
                do("dS, dB", "dY, S, B", "parts of dS, parts of dB"),
                do("sums", "parts of dS, parts of dB", "dS, dB"),
                do("dA", "dS, x", "parts of dA"),
                do("sum", "parts of dA", "dA"),
                do("dY W + s·dS A", "dY, W, dS, A", "dX"),
            ],
        ),
    ]


def fold(shape: Shape) -> list[Way]:
    """Return the ways to add modules to a weight, W += s·B A; the first only copies it."""
    do = launches_of(shape)
    return [
        Way("a copy of W", [do("copy", "W", "W")]),
        Way(
            "PEFT's merge, bf16",
            [do("B A", "A, B", "BA"), do("s·B A", "BA", "BA"), do("W += s·B A", "W, BA", "W")],
        ),
        Way("fold_", [do("W += s·B A", "W, A, B", "W")]),
    ]


def clients(shape: Shape, count: int) -> list[Way]:
    """Return the ways to compute the forward of `count` clients over one W, each with M rows and modules of its own."""
    one = {way.title: way.launches for way in forward(shape)}
    do = launches_of(shape._replace(m=count * shape.m))
    groups = launches_of(shape._replace(r=count * shape.r))
    stacks = {name: groups("", name, name).reads[name] for name in ("A", "B")}
    side = do("S", "x, A", "S")
    product = do("x Wᵀ + s·S Bᵀ", "x, W, S, B", "y")
    together = [
        Launch(
            launch.name,
            {**launch.reads, **{name: stacks[name] for name in launch.reads if name in stacks}},
            launch.writes,
        )
        for launch in (side, product)
    ]
    return [
        Way("x Wᵀ alone, in turn", one["x Wᵀ alone"], count),
        Way("PEFT, bf16, in turn", one["PEFT, bf16 factors"], count),
        Way("two_launch, in turn", one["two_launch"], count),
        Way("in one pass", together),
    ]
