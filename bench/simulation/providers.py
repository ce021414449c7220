"""Who is measured, each from the same values on the same batches with the same optimiser.

*base* is the bare model on the whole batch; *peft-loop* PEFT's layers, one client after another; *sequential* the same
with this library's layers and the simulator's loss; *vmap* PEFT's model mapped over stacked adapters; *cohort* the
simulator's cohort executor, and *cohort-compiled* the same with `cohort_compile`.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.simulation.base import BareBase
from bench.simulation.cases import BERT_BASE, DIGITS_VIT, SimulationCase, simulation_cases
from bench.simulation.problem import Problem
from bench.simulation.resident import peft_loop, sequential
from bench.simulation.stacked import StackedTrainer
from bench.simulation.together import CohortTrainer, compiled
from bench.simulation.trainer import Trainer

TRAINERS: dict[str, Callable[[Problem], Trainer]] = {
    "peft-loop": peft_loop,
    "vmap": StackedTrainer,
    "sequential": sequential,
    "cohort": CohortTrainer,
    "cohort-compiled": compiled,
}
PROVIDERS = ("base", *TRAINERS)
# Compiling takes longer than all the rest of a case: for most models, and on a GPU, whose time is short, it is measured
# for a client alone and for the usual cohort.
COMPILED, COMPILED_COHORTS = "cohort-compiled", (1, 10)


def providers_of(case: SimulationCase) -> tuple[str, ...]:
    """Return who is measured in a case."""
    at_every_size = case.model in (DIGITS_VIT, BERT_BASE) and case in simulation_cases("cpu")
    compiles = at_every_size or case.cohort in COMPILED_COHORTS
    return tuple(name for name in PROVIDERS if name != COMPILED or compiles)


def make_step(name: str, problem: Problem) -> tuple[Callable[[], None], Trainer | None]:
    """Return a provider's step and, where it has clients, what shows their gradients."""
    if name == "base":
        return BareBase(problem).step, None
    trainer = TRAINERS[name](problem)
    return trainer.step, trainer
