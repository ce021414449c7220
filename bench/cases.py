"""What is measured: projections of real models, the passes over them, and the sizes a device can carry."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Op = Literal["forward", "forward_backward", "fold"]

OPS: tuple[Op, ...] = ("forward", "forward_backward", "fold")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Projection:
    """A linear map of a public model, (…, k) to (…, n): `model` and `name` say which."""

    model: str
    name: str
    k: int
    n: int


@dataclass(frozen=True)
class Case:
    """One pass (`op`) over one projection: m rows of x, rank r, one dtype; fold has no rows (m = 0)."""

    op: Op
    projection: Projection
    m: int
    r: int
    dtype: str

    @property
    def name(self) -> str:
        """A key unique among the cases of one op on one device, readable in a test id."""
        where = f"{self.projection.model}-{self.projection.name}-{self.projection.k}x{self.projection.n}"
        rows = f"-m{self.m}" if self.m else ""
        return f"{where}{rows}-r{self.r}-{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Problem:
    """The tensors every provider of a case shares.

    x (m, k), weight (n, k), A (r, k), B (n, r) and grad_y (m, n) of the case's dtype, for y = x Wᵀ +
    scale·(x Aᵀ) Bᵀ. B is not zero and the update is about as large as the base output, so an error in either
    shows. `more` holds further (x, grad_y) that timed calls take in turn, so that no call finds the last one's in a
    cache.
    """

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    grad_y: Tensor
    scale: float
    more: tuple[tuple[Tensor, Tensor], ...] = ()

    def inputs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return every (x, grad_y), the first of which is what results are checked on."""
        return ((self.x, self.grad_y), *self.more)


# Attention and feed-forward projections of BERT-base, Llama 3.2 1B and Llama 3.1 8B.
PROJECTIONS = (
    Projection("bert-base", "query", 768, 768),
    Projection("bert-base", "up", 768, 3072),
    Projection("bert-base", "down", 3072, 768),
    Projection("llama-1b", "key", 2048, 512),
    Projection("llama-1b", "query", 2048, 2048),
    Projection("llama-1b", "up", 2048, 8192),
    Projection("llama-1b", "down", 8192, 2048),
    Projection("llama-8b", "key", 4096, 1024),
    Projection("llama-8b", "query", 4096, 4096),
    Projection("llama-8b", "up", 4096, 14336),
    Projection("llama-8b", "down", 14336, 4096),
)

RANK = 16
ALPHA_PER_RANK = 2.0
WIDER_RANKS = (32, 64)
WIDER_RANKS_AT = ("llama-1b", "query")


def cases(device_type: str) -> tuple[Case, ...]:
    """List a device's cases: bf16 with 8192 rows on a GPU; fp32 with 512 rows, the same K×N, elsewhere."""
    m, dtype = (8192, "bfloat16") if device_type == "cuda" else (512, "float32")
    found = []
    for op in OPS:
        for projection in PROJECTIONS:
            wide = (projection.model, projection.name) == WIDER_RANKS_AT
            for r in (RANK, *WIDER_RANKS) if wide else (RANK,):
                found.append(Case(op, projection, 0 if op == "fold" else m, r, dtype))
    return tuple(found)


def make_problem(case: Case, device: torch.device, seed: int = 0, sets: int = 1) -> Problem:
    """Draw a case's tensors on `device` from `seed`, x and grad_y `sets` times; other devices draw other values."""
    generator = torch.Generator(device).manual_seed(seed)
    k, n, r = case.projection.k, case.projection.n, case.r

    def normal(rows: int, columns: int, variance: float = 1.0) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device).mul_(variance**0.5)
        return drawn.to(case.torch_dtype)

    return Problem(
        x=normal(case.m, k),
        weight=normal(n, k, 1 / k),
        A=normal(r, k, 1 / k),
        B=normal(n, r, 1 / (ALPHA_PER_RANK**2 * r)),
        grad_y=normal(case.m, n),
        scale=ALPHA_PER_RANK,
        more=tuple((normal(case.m, k), normal(case.m, n)) for _ in range(sets - 1)),
    )
