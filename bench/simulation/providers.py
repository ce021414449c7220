"""The providers that are measured, all from the same values on the same batches with the same optimiser.

*base* is the bare model on the whole batch; *peft-loop* PEFT's layers, one client after another; *sequential* the same
with this library's layers and the simulator's loss; *vmap* PEFT's model mapped over stacked adapters; *cohort* the
simulator's cohort executor, and *cohort-compiled* the same with `cohort_compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bench.simulation.cases import BERT_BASE, DIGITS_VIT, SMOLLM2, SimulationCase, simulation_cases
from bench.simulation.cohort import CohortTrainer, compiled
from bench.simulation.models import first_block, sharing_weights
from bench.simulation.problem import Problem, Trainer
from bench.simulation.resident import peft_loop, sequential
from bench.simulation.vmap import StackedTrainer

TRAINERS: dict[str, Callable[[Problem], Trainer]] = {
    "peft-loop": peft_loop,
    "vmap": StackedTrainer,
    "sequential": sequential,
    "cohort": CohortTrainer,
    "cohort-compiled": compiled,
}
PROVIDERS = ("base", *TRAINERS)
# Compiling takes longer than the rest of a case. So for most models, and for all on a GPU, the compiled provider is
# measured only for a single client and for the usual cohort; rows of unequal length it would have to pad.
COMPILED, COMPILED_COHORTS = "cohort-compiled", (1, 10)


def providers_of(case: SimulationCase) -> tuple[str, ...]:
    """Return the providers of a case."""
    at_every_size = case.model in (DIGITS_VIT, BERT_BASE, SMOLLM2) and case in simulation_cases("cpu")
    compiles = (at_every_size or case.cohort in COMPILED_COHORTS) and not case.unequal
    return tuple(name for name in PROVIDERS if name != COMPILED or compiles)


def make_step(name: str, problem: Problem) -> tuple[Callable[[], None], Trainer | None]:
    """Return a provider's step and, if it has clients, the trainer that returns their gradients."""
    if name == "base":
        return BareBase(problem).step, None
    trainer = TRAINERS[name](problem)
    return trainer.step, trainer


class BareBase:
    """Runs forward, and backward to the first layer's input: no adapters, and of weights only a head's gradient.

    Only `step` is used: there are no clients and nothing is trained.
    """

    def __init__(self, problem: Problem) -> None:
        self.model = sharing_weights(problem.model, problem.heads)
        self.head = [
            parameter
            for name in problem.heads
            for parameter in self.model.get_submodule(name).requires_grad_().parameters()
        ]
        self.batch, self.cohort = problem.joined(), len(problem.batches)
        self.entered: Tensor | None = None
        first_block(self.model).register_forward_pre_hook(self._enter)

    def step(self) -> None:
        for parameter in self.head:
            parameter.grad = None
        # The sum of the clients' mean losses, because their batches have the same size.
        (self.model(**self.batch).loss * self.cohort).backward()

    def _enter(self, block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Make the input of the first layer, (rows, length, width), require a gradient."""
        self.entered = given[0].detach().requires_grad_()
        return (self.entered, *given[1:])
