"""Who is measured, each from the same values on the same batches with the same optimiser.

*base* is the bare model on the whole batch; *peft-loop* PEFT's layers, one client after another; *sequential* the same
with this library's layers and the simulator's loss; *vmap* PEFT's model mapped over stacked adapters; *cohort* the
simulator's cohort executor.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.simulation.base import BareBase
from bench.simulation.problem import Problem
from bench.simulation.resident import peft_loop, sequential
from bench.simulation.stacked import StackedTrainer
from bench.simulation.together import CohortTrainer
from bench.simulation.trainer import Trainer

TRAINERS: dict[str, Callable[[Problem], Trainer]] = {
    "peft-loop": peft_loop,
    "vmap": StackedTrainer,
    "sequential": sequential,
    "cohort": CohortTrainer,
}
PROVIDERS = ("base", *TRAINERS)


def make_step(name: str, problem: Problem) -> tuple[Callable[[], None], Trainer | None]:
    """Return a provider's step and, where it has clients, what shows their gradients."""
    if name == "base":
        return BareBase(problem).step, None
    trainer = TRAINERS[name](problem)
    return trainer.step, trainer
