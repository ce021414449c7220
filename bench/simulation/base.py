"""The bare base model on the cohort's batch: what any way to train the cohort has to do at least."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.simulation.models import first_block, sharing_weights
from bench.simulation.problem import Problem


class BareBase:
    """Runs forward, and backward to the first layer's input: no adapters, no gradient of a weight but the head's.

    Only `step` means anything here: there are no clients and nothing is trained.
    """

    def __init__(self, problem: Problem) -> None:
        self.model = sharing_weights(problem.model, [problem.head])
        self.head = list(self.model.get_submodule(problem.head).requires_grad_().parameters())
        self.batch, self.cohort = problem.joined(), len(problem.batches)
        self.entered: Tensor | None = None
        first_block(self.model).register_forward_pre_hook(self._enter)

    def step(self) -> None:
        for parameter in self.head:
            parameter.grad = None
        # The sum of the clients' means, whose batches are of one size.
        (self.model(**self.batch).loss * self.cohort).backward()

    def _enter(self, block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Ask for the gradient of the states that enter the first layer, (rows, length, width)."""
        self.entered = given[0].detach().requires_grad_()
        return (self.entered, *given[1:])
