"""Problems of several groups in one call, and the reference's results for each group alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import plora_kernels as pk
from tests.support.numerics import (
    DEVICE,
    Problem,
    differentiated,
    make_problem,
    random_mask,
    variance_of_rows_sum,
)

# The share of modules that are selected (None: all), and the form of the others.
FORMS = [(None, "folded"), (0.4, "folded"), (0.4, "frozen"), (0.0, "folded"), (0.0, "frozen")]


@dataclass
class GroupedProblem:
    """One problem per group; scales is one number or one per group.

    All have the same weight and bias unless `own_weights` says that each has its own: (C, N, K) and (C, N). Those are
    stored as (C, K, N) if `turned`.
    """

    problems: list[Problem]
    scale: float | Sequence[float]
    own_weights: bool = False
    turned: bool = False
    bounds: list[int] = field(init=False)
    x: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    lora_A: Tensor = field(init=False)
    lora_B: Tensor = field(init=False)
    bias: Tensor | None = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Concatenate the groups' tensors."""
        problems = self.problems
        self.bounds = [0, *itertools.accumulate(problem.x.shape[0] for problem in problems)]
        self.x, self.dy = (torch.cat([getattr(problem, name) for problem in problems]) for name in ("x", "dy"))
        self.weight, self.bias = problems[0].weight, problems[0].bias
        if self.own_weights:
            self.weight = torch.stack([problem.weight for problem in problems])
            self.bias = None if self.bias is None else torch.stack([problem.bias for problem in problems])
        if self.turned:
            self.weight = self.weight.mT.contiguous().mT
        self.lora_A = torch.stack([problem.lora_A for problem in problems])
        self.lora_B = torch.stack([problem.lora_B for problem in problems])

    def form(self) -> dict[str, Any]:
        """Return the operator's other arguments."""
        first = self.problems[0]
        form = {"groups": self.bounds, "scale": self.scale, "dropout_seed": [p.dropout_seed for p in self.problems]}
        if first.mask is not None:
            form["selected"] = torch.stack([problem.mask for problem in self.problems])
        return first.form() | form

    def reference_results(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return y, dx, dA, dB, dbias of the reference, computed in `dtype` for one group after another."""
        results = [problem.reference_results(dtype) for problem in self.problems]
        y, dx, d_A, d_B, d_bias = zip(*results, strict=True)
        of_bias = torch.stack(d_bias) if self.own_weights else self.dy.to(dtype).sum(0)
        return torch.cat(y), torch.cat(dx), torch.stack(d_A), torch.stack(d_B), of_bias

    def variances(self) -> tuple[Tensor, ...]:
        """Return the expected variance of the errors of y, dx, dA, dB, dbias."""
        y, dx, d_A, d_B, d_bias = zip(*(problem.variances() for problem in self.problems), strict=True)
        of_bias = torch.stack(d_bias) if self.own_weights else variance_of_rows_sum(self.dy)
        return torch.cat(y), torch.cat(dx), torch.stack(d_A), torch.stack(d_B), of_bias


def draw_grouped(
    sizes: Sequence[int],
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    *,
    share: float | None = None,
    unselected: str = "folded",
    scale: float | Sequence[float] = 0.5,
    bias: bool = True,
    dropout_p: float = 0.0,
    seed: int = 0,
    device: str = DEVICE,
    own_weights: bool = False,
    turned: bool = False,
) -> GroupedProblem:
    """Draw groups of `sizes` rows; each selects about `share` of its modules (None: all)."""
    problems: list[Problem] = []
    for g, rows in enumerate(sizes):
        mask = None if share is None else random_mask(rank, 100 * seed + g, share, device)
        own = scale if isinstance(scale, float) else scale[g]
        options = {"unselected": unselected, "scale": own, "bias": bias, "dropout_p": dropout_p, "device": device}
        problem = make_problem(rows, k, n, rank, dtype, mask=mask, seed=100 * seed + g, **options)
        if problems and not own_weights:
            problem.weight, problem.bias = problems[0].weight, problems[0].bias
        problems.append(problem)
    return GroupedProblem(problems, scale, own_weights, turned)


def run_each_group(problem: GroupedProblem) -> tuple[Tensor, ...]:
    """Return the same by one call for each group."""

    def apart(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
        parts = []
        for g, (start, end) in enumerate(itertools.pairwise(problem.bounds)):
            one = problem.problems[g]
            form = one.form() | {"bias": bias[g] if problem.own_weights and bias is not None else bias}
            parts.append(pk.plora_linear(x[start:end], one.weight, lora_A[g], lora_B[g], **form))
        return torch.cat(parts)

    return differentiated(problem, apart)
