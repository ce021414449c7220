"""The inputs of checks on a device, and what results are compared with: a layer's tensors and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import plora_kernels as pk
from bench.cases import generator_on
from bench.checks.correctness import Results, WrongResultError, check
from bench.checks.designs import Shape as AuditShape
from bench.checks.designs import design_blocks
from plora_kernels import reference
from plora_kernels.counter_rng import multiplier
from plora_kernels.tuning.blocks import DESIGNS, Blocks, Hardware
from plora_kernels.tuning.lookup import hardware_of

FORMS = (
    "all",
    "folded mask",
    "frozen mask",
    "folded mask dropout",
    "frozen mask dropout",
    "none selected",
    "strided",
    "fold",
    "folds agree",
    "deterministic",
    "replayed",
    "grouped",
    "grouped mask dropout",
    "siblings",
)
CUDA_FORMS = ("graph replay", "no synchronisation")

# The dtype of x and the weight. The factors have it too, or with MIXED before its name they are float32.
MIXED = "mixed-"
DTYPES = {
    "bfloat16": torch.bfloat16,
    f"{MIXED}bfloat16": torch.bfloat16,
    "float16": torch.float16,
    f"{MIXED}float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
# A gradient of so many elements has some that half precision does not hold.
MANY_ELEMENTS = 64
# tf32 keeps ten bits of the mantissa.
TF32_EPS = 2.0**-10
GRADIENTS = ("dx", "dA", "dB", "dbias")
SCALE, DROPOUT_P, DROPOUT_SEED = 0.5, 0.25, 7

# The usual names of so many linears of one input; for folds with the output's linear.
SIBLINGS = {
    1: ("proj",),
    2: ("gate_proj", "up_proj"),
    3: ("q_proj", "k_proj", "v_proj"),
    4: ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True)
class Inputs:
    """One layer's tensors: x (M, K), weight (N, K), A (R, K), B (N, R), bias (N,), dy (M, N), mask (R,) on the host.

    A and B have the dtype of the others, or float32.
    """

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor
    dy: Tensor
    mask: Tensor


def draw(shape: CheckShape) -> Inputs:
    """Draw a shape's tensors, always the same."""
    seed = hash((shape.m, shape.k, shape.n, shape.r)) % 2**31
    generator = generator_on(torch.device(shape.device), seed)

    m, k, n, r = shape.m, shape.k, shape.n, shape.r

    def normal(*size: int, spread: float = 1.0, dtype: torch.dtype = DTYPES[shape.dtype]) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=shape.device) * spread
        # An output of one element has no others that show its scale, so its terms must not cancel.
        return (drawn.abs() if m * n * k == 1 else drawn).to(dtype)

    return Inputs(
        x=normal(m, k),
        weight=normal(n, k, spread=k**-0.5),
        A=normal(r, k, spread=k**-0.5, dtype=shape.factors),
        B=normal(n, r, spread=r**-0.5, dtype=shape.factors),
        bias=normal(n),
        dy=normal(m, n, spread=n**-0.5),
        mask=torch.arange(r) % 3 == 0,
    )


def frozen_linear(weight: Tensor) -> nn.Linear:
    """Return a frozen bias-free nn.Linear that shares `weight`'s storage."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Siblings(nn.Module):
    """Linears of one x (m, k), called one after another; returns each one's y (m, n)."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        for name, weight in zip(SIBLINGS[len(weights)], weights, strict=True):
            self.add_module(name, frozen_linear(weight))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


def fused_siblings(
    weights: Sequence[Tensor], factors: Sequence[tuple[Tensor, Tensor]], scale: float
) -> tuple[Siblings, list[pk.FusedPLoRALinear]]:
    """Return linears of one x that `fuse_projections` computes in one launch, and their layers."""
    siblings, names, rank = Siblings(weights), SIBLINGS[len(weights)], factors[0][0].shape[0]
    config = pk.PLoRAConfig(
        rank=rank, alpha=scale * rank, target_modules=list(names), fuse_projections=True,
        adapter_dtype=factors[0][0].dtype,
    )  # fmt: skip
    handle = pk.inject(siblings, config)
    handle.set_factors(dict(zip(names, factors, strict=True)))
    return siblings, list(handle.layers.values())


def expected(
    inputs: Inputs,
    dtype: torch.dtype,
    mask: Tensor | None,
    unselected: str,
    dropout_p: float = 0.0,
    dropout_seed: int = DROPOUT_SEED,
) -> Results:
    """Return y and every gradient of ⟨y, dy⟩ by plain torch in a dtype."""
    x, weight, A, B, bias, dy = (
        t.to(dtype) for t in (inputs.x, inputs.weight, inputs.A, inputs.B, inputs.bias, inputs.dy)
    )
    mask = None if mask is None else mask.to(x.device)
    seed = torch.tensor(dropout_seed, device=x.device)
    dropped = multiplier(seed, x.shape[0], x.shape[1], dropout_p, dtype) if dropout_p else None
    y = reference.forward(x, weight, A, B, mask, bias=bias, scale=SCALE, unselected=unselected, dropout=dropped)
    gradients = reference.gradients(dy, x, weight, A, B, mask, scale=SCALE, unselected=unselected, dropout=dropped)
    return {"y": y, **dict(zip(GRADIENTS, gradients, strict=True))}


def by_operator(inputs: Inputs, A: Tensor, B: Tensor, mask: Tensor | None, **form: Any) -> Results:
    """Return y and every gradient of ⟨y, dy⟩ by `plora_linear`, with the given factors and `form` of the call."""
    x, A, B, bias = leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, A, B, inputs.bias)]
    y = pk.plora_linear(x, inputs.weight, A, B, mask, bias=bias, scale=SCALE, **form)
    gradients = torch.autograd.grad(y, leaves, inputs.dy)
    return {"y": y.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}


def assert_within_bound(
    shape: CheckShape, form: str, results: Results, wanted: Callable[[torch.dtype], Results]
) -> None:
    """Raise WrongResultError if results are further from `wanted(float64)` than `bench.checks.correctness` allows.

    `wanted(dtype)` is the result of plain torch in a dtype; its error in the shape's dtype sets the bound. Gradients of
    float32 factors beside half precision must also be float32 and hold more digits than half precision does.
    """
    exact, plain = wanted(torch.float64), wanted(DTYPES[shape.dtype])
    check(form, results, exact, plain, eps=TF32_EPS if shape.dtype == "tf32" else None)
    if shape.factors is not DTYPES[shape.dtype]:
        for name in sorted(results.keys() & {"dA", "dB"}):
            require_unrounded(f"{form}: {name}", results[name], DTYPES[shape.dtype])


def require_unrounded(name: str, gradient: Tensor, half: torch.dtype) -> None:
    """Raise WrongResultError unless a gradient is float32 and was not rounded to `half`."""
    if gradient.dtype is not torch.float32:
        raise WrongResultError(f"{name} is {gradient.dtype}; gradients of float32 factors are float32")
    # A few numbers may fit half precision by chance.
    if gradient.is_meta or gradient.numel() < MANY_ELEMENTS or not gradient.any():
        return
    if torch.equal(gradient.to(half).float(), gradient):
        raise WrongResultError(f"{name} holds numbers of {half} only; float32 sums are not rounded to that")


def require_equal(form: str, first: Results, second: Results) -> None:
    """Raise WrongResultError if two runs differ by a bit; tensors without storage are skipped."""
    for name, value in first.items():
        if not value.is_meta and not torch.equal(value, second[name]):
            distance = (value.double() - second[name].double()).abs().max().item()
            raise WrongResultError(f"{form}: {name} of two runs differ by {distance:.3g}")


@dataclass(frozen=True)
class CheckShape:
    """One of DTYPES ("tf32" is float32 with tf32 allowed) and a shape on one device type; all forms of it.

    On "meta" nothing is compared: the forms of a GPU are run for what they launch.
    """

    device: str
    dtype: str
    m: int
    k: int
    n: int
    r: int

    @property
    def factors(self) -> torch.dtype:
        """The dtype of A and B."""
        return torch.float32 if self.dtype.startswith(MIXED) else DTYPES[self.dtype]

    def forms(self) -> tuple[str, ...]:
        """Return the forms to check; designs only on a GPU that has them and for rows aligned to 16."""
        forms = tuple(form for form in FORMS if self.m > 1 or not form.startswith("grouped"))  # one row is one group
        if self.device == "cpu":
            return forms
        here = torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else torch.device(self.device)
        hardware = hardware_of(here)
        aligned = self.k % 16 == 0 and self.n % 16 == 0
        designs = [f"design {design}" for design in DESIGNS if aligned and self.blocks(design, hardware)]
        # A CUDA graph launches the same kernels as a call, so without a device there is nothing to compile for it.
        return forms + (CUDA_FORMS if self.device == "cuda" else CUDA_FORMS[1:]) + tuple(designs)

    def blocks(self, design: str, hardware: Hardware) -> dict[str, Blocks]:
        """Return blocks of a design for the forward and dX of this shape, or none if it does not run."""
        shape = AuditShape(self.m, self.k, self.n, self.r)
        return design_blocks(design, shape, self.dtype.removeprefix(MIXED), hardware)
