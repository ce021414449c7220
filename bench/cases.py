"""The cases: projections of real models, the passes over them, and the least work of each."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Op = Literal[
    "forward",
    "forward_backward",
    "fold",
    "dropout",
    "mixed_forward",
    "mixed",
    "projections_forward",
    "projections",
    "fold_out",
    "fold_many",
]
# The passes over one projection, which are measured at every shape; the other ops are measured at fewer.
MAIN_OPS: tuple[Op, ...] = ("forward", "forward_backward", "fold")
OPS: tuple[Op, ...] = get_args(Op)
# A forward, and a forward and backward, of factors in fp32 over a weight in half precision.
MIXED_OPS: tuple[Op, ...] = ("mixed_forward", "mixed")
# The ops that compute gradients, and those whose cases have no rows.
BACKWARD: tuple[Op, ...] = ("forward_backward", "dropout", "mixed", "projections")
FOLDS: tuple[Op, ...] = ("fold", "fold_out", "fold_many")
# The probability of LoRA dropout in op "dropout".
DROPOUT_P = 0.1

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Projection:
    """A linear map of a public model, (…, k) to (…, n): `model` and `name` identify it.

    Several projections of one input are one object with their `widths`, whose sum is n; a single one has no `widths`.
    """

    model: str
    name: str
    k: int
    n: int
    widths: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Return the number of projections."""
        return len(self.widths) or 1


@dataclass(frozen=True)
class Case:
    """One pass (`op`) over one projection, or several of one input: m rows of x (0 for folds), rank r each, a dtype."""

    op: Op
    projection: Projection
    m: int
    r: int
    dtype: str

    @property
    def name(self) -> str:
        """A key unique among the cases of one op on one device, readable in a test id."""
        name = self.projection.name.replace(", ", "-")
        where = f"{self.projection.model}-{name}-{self.projection.k}x{self.projection.n}"
        rows = f"-m{self.m}" if self.m else ""
        return f"{where}{rows}-r{self.r}-{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def dropout_p(self) -> float:
        return DROPOUT_P if self.op == "dropout" else 0.0

    def facts(self) -> dict[str, object]:
        """Return what is measured, as saved figures name it; several projections with their widths."""
        where = self.projection
        found: dict[str, object] = {
            "op": self.op,
            "model": where.model,
            "projection": where.name,
            "m": self.m,
            "k": where.k,
            "n": where.n,
            "r": self.r,
            "dtype": self.dtype,
        }
        return found | {"widths": list(where.widths)} if where.widths else found


@dataclass(frozen=True)
class Problem:
    """The tensors every provider of a case shares.

    x (m, k), weight (n, k), A (r, k), B (n, r) and grad_y (m, n) of the case's dtype, for y = x Wᵀ + scale·(x Aᵀ) Bᵀ. B
    is not zero and the update is about as large as the base output, so an error in either shows. `more` holds further
    (x, grad_y) that timed calls use in turn, so that no call finds its inputs in a cache. Several projections have
    `widths`, their weights, B and grad_y in one tensor, and A (r each, k).
    """

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    grad_y: Tensor
    scale: float
    more: tuple[tuple[Tensor, Tensor], ...] = ()
    widths: tuple[int, ...] = ()

    def inputs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return every (x, grad_y), the first of which is used to check results."""
        return ((self.x, self.grad_y), *self.more)

    def parts(self) -> tuple["Problem", ...]:
        """Return the problem of each projection, all of the same x, for checking results."""
        widths = list(self.widths or self.weight.shape[:1])
        each = zip(
            self.weight.split(widths),
            self.A.split(self.B.shape[1]),
            self.B.split(widths),
            self.grad_y.split(widths, 1),
            strict=True,
        )
        return tuple(
            replace(self, weight=weight, A=A, B=B, grad_y=grad_y, more=(), widths=()) for weight, A, B, grad_y in each
        )


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


def several(model: str, name: str, k: int, *widths: int) -> Projection:
    """Return several projections of one input as one."""
    return Projection(model, name, k, sum(widths), widths)


# The projections of an attention's input; the same with its output's, which a fold takes too; and the two of a gated
# feed-forward layer.
QKV = (
    several("bert-base", "q, k, v", 768, 768, 768, 768),
    several("llama-1b", "q, k, v", 2048, 2048, 512, 512),
    several("llama-8b", "q, k, v", 4096, 4096, 1024, 1024),
)
QKVO = (
    several("bert-base", "q, k, v, o", 768, 768, 768, 768, 768),
    several("llama-1b", "q, k, v, o", 2048, 2048, 512, 512, 2048),
    several("llama-8b", "q, k, v, o", 4096, 4096, 1024, 1024, 4096),
)
GATE_UP = several("llama-1b", "gate, up", 2048, 8192, 8192)

RANK = 16
ALPHA_PER_RANK = 2.0
WIDER_RANKS = (32, 64)
WIDER_RANKS_AT = ("llama-1b", "query")
CPU_WIDEST_K = 2048


def cases(device_type: str) -> tuple[Case, ...]:
    """List a device's cases: bf16 with 8192 rows on a GPU; fp32 with 512 rows, the same K×N, elsewhere.

    Cases of mixed precision are in bf16 everywhere.
    """
    m, dtype = (8192, "bfloat16") if device_type == "cuda" else (512, "float32")
    found = []
    for op in OPS:
        for projection in _measured_by(op, device_type):
            wide = op in MAIN_OPS and (projection.model, projection.name) == WIDER_RANKS_AT
            for r in (RANK, *WIDER_RANKS) if wide else (RANK,):
                found.append(Case(op, projection, 0 if op in FOLDS else m, r, "bfloat16" if op in MIXED_OPS else dtype))
    return tuple(found)


def _measured_by(op: Op, device_type: str) -> tuple[Projection, ...]:
    """Return an op's projections: every one of the main ops, one of each model of the others.

    Passes with rows leave the largest model to GPUs: on a CPU smaller ones show the same ratios.
    """
    if op in MAIN_OPS or op in MIXED_OPS:
        return PROJECTIONS
    if op == "fold_many":
        return QKVO
    queries = tuple(projection for projection in PROJECTIONS if projection.name == "query")
    found = QKV if op in ("projections", "projections_forward") else queries
    if device_type == "cuda":
        return (*found, GATE_UP) if found is QKV else found
    return tuple(projection for projection in found if op in FOLDS or projection.k <= CPU_WIDEST_K)


def generator_on(device: torch.device, seed: int) -> torch.Generator | None:
    """Return a generator that starts from a seed; None on "meta", where nothing is drawn."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def make_problem(case: Case, device: torch.device, seed: int = 0, sets: int = 1) -> Problem:
    """Draw a case's tensors on `device` from `seed`, x and grad_y `sets` times; other devices draw other values."""
    generator = generator_on(device, seed)
    k, n, r, count = case.projection.k, case.projection.n, case.r, case.projection.count

    def normal(rows: int, columns: int, variance: float = 1.0) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device).mul_(variance**0.5)
        return drawn.to(case.torch_dtype)

    return Problem(
        x=normal(case.m, k),
        weight=normal(n, k, 1 / k),
        A=normal(count * r, k, 1 / k),
        B=normal(n, r, 1 / (ALPHA_PER_RANK**2 * r)),
        grad_y=normal(case.m, n),
        scale=ALPHA_PER_RANK,
        more=tuple((normal(case.m, k), normal(case.m, n)) for _ in range(sets - 1)),
        widths=case.projection.widths,
    )


def operations(case: Case, *, adapted: bool) -> int:
    """Return the floating-point operations of the mathematics, a multiply and an add as two.

    A forward: 2·M·N·K, adapted + 2·M·R·(P·K + N), where N is the sum of P projections' widths. With a backward dX as
    much again, and for the adapters dS, dS·A, dA and dB besides S and S·Bᵀ: 4·M·N·K + 6·M·R·(P·K + N). Folds: 2·N·K·R.
    Drawing dropout's mask is not counted.
    """
    m, k, n, r = case.m, case.projection.k, case.projection.n, case.r if adapted else 0
    if case.op in FOLDS:
        return 2 * n * k * r
    backward = case.op in BACKWARD
    return (2 if backward else 1) * 2 * m * n * k + (3 if backward else 1) * 2 * m * _factors(case, r)


def least_bytes(case: Case, *, adapted: bool) -> int:
    """Return the bytes moved when every operand is read once and every result written once.

    A forward: x, W, y, adapted A and B. With a backward also dY, W, dX and, adapted, x again, A, B, dA and dB.
    Folds: W read and the result written, adapted A and B.
    """
    m, k, n, r = case.m, case.projection.k, case.projection.n, case.r if adapted else 0
    factors = _factors(case, r)
    if case.op in FOLDS:
        elements = 2 * n * k + factors
    elif case.op in BACKWARD:
        elements = 2 * (m * k + n * k + m * n) + (m * k if adapted else 0) + 3 * factors
    else:
        elements = m * k + n * k + m * n + factors
    return elements * case.torch_dtype.itemsize


def _factors(case: Case, r: int) -> int:
    """Return the number of elements of A (r, K) and B (N, r) of all projections."""
    return r * (case.projection.count * case.projection.k + case.projection.n)
