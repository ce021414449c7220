"""Problems of several groups in one call, and what the reference says of each group alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support.numerics import Problem, make_problem, random_mask


@dataclass
class GroupedProblem:
    """One problem a group, which share weight and bias; scales is one number or one a group."""

    problems: list[Problem]
    scale: float | Sequence[float]
    bounds: list[int] = field(init=False)
    x: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    lora_A: Tensor = field(init=False)
    lora_B: Tensor = field(init=False)
    bias: Tensor | None = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Put the groups' tensors together."""
        problems = self.problems
        self.bounds = [0, *itertools.accumulate(problem.x.shape[0] for problem in problems)]
        self.x, self.dy = (torch.cat([getattr(problem, name) for problem in problems]) for name in ("x", "dy"))
        self.weight, self.bias = problems[0].weight, problems[0].bias
        self.lora_A = torch.stack([problem.lora_A for problem in problems])
        self.lora_B = torch.stack([problem.lora_B for problem in problems])

    def form(self) -> dict[str, Any]:
        """Return the operator's other arguments."""
        first = self.problems[0]
        masks = [problem.mask for problem in self.problems]
        form = {"bias": first.bias, "scale": self.scale, "unselected": first.unselected, "groups": self.bounds}
        form["selected"] = None if first.mask is None else torch.stack(masks)  # type: ignore[arg-type]
        return form | {"dropout_p": first.dropout_p, "dropout_seed": [p.dropout_seed for p in self.problems]}

    def form_of(self, group: int) -> dict[str, Any]:
        """Return the arguments of a call on one group alone."""
        p = self.problems[group]
        form = {"bias": p.bias, "scale": p.scale, "unselected": p.unselected, "selected": p.mask}
        return form | {"dropout_p": p.dropout_p, "dropout_seed": p.dropout_seed}

    def reference_results(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return y, dx, dA, dB, dbias of the reference computed in `dtype`, a group at a time."""
        results = [problem.reference_results(dtype) for problem in self.problems]
        y, dx, d_A, d_B, _ = zip(*results, strict=True)
        return torch.cat(y), torch.cat(dx), torch.stack(d_A), torch.stack(d_B), self.dy.to(dtype).sum(0)


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
    device: str = "cpu",
) -> GroupedProblem:
    """Draw groups of `sizes` rows; each selects about `share` of its modules (None: all)."""
    problems: list[Problem] = []
    for g, rows in enumerate(sizes):
        mask = None if share is None else random_mask(rank, 100 * seed + g, share).to(device)
        own = scale if isinstance(scale, float) else scale[g]
        options = {"unselected": unselected, "scale": own, "bias": bias, "dropout_p": dropout_p, "device": device}
        problem = make_problem(rows, k, n, rank, dtype, mask=mask, seed=100 * seed + g, **options)
        if problems:
            problem.weight, problem.bias = problems[0].weight, problems[0].bias
        problems.append(problem)
    return GroupedProblem(problems, scale)
