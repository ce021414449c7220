"""The simulator's cohort executor, a step at a time."""

from __future__ import annotations

import copy
import weakref
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import plora_kernels as pk
from bench.simulation.cases import ALPHA, RANK
from bench.simulation.models import sharing_weights
from bench.simulation.problem import LEARNING_RATE, WEIGHT_DECAY, Problem, Values
from fed.base import SharedBase
from fed.cohort import Cohort, Span
from fed.local import Job, Workplace
from fed.samples import DenseTable, Split
from fed.streams import Source
from fed.types import Client, ClientStart

# Every client has one batch, which it sees in another order of rows at each of these steps, and then again.
STEPS = 16


class CohortTrainer:
    """Trains all clients in one forward and one backward, as a round of the simulator does between its ends."""

    def __init__(self, problem: Problem) -> None:
        config = pk.PLoRAConfig(
            rank=RANK, alpha=ALPHA, target_modules=problem.matrices, modules_to_save=(problem.head,)
        )
        handle = pk.inject(sharing_weights(problem.model, [problem.head]), config)
        head = {
            f"{problem.head}.{name}": parameter
            for name, parameter in handle.model.get_submodule(problem.head).named_parameters()
        }
        device = next(iter(head.values())).device
        work = Workplace(handle.model, handle, head, device, SharedBase(handle.layers), RANK)
        rows = problem.joined()
        table = DenseTable(rows, rows.pop("labels"))
        size = len(table) // len(problem.starts)
        self.cohort = Cohort(work, [_job(problem, table, size, c) for c in range(len(problem.starts))], _settings(size))
        self.span = Span(self.cohort, len(problem.starts))
        self.number = 0
        running = ExitStack()  # entered for good: a round enters it once, for all its steps
        running.enter_context(self.span.running())
        weakref.finalize(self, running.close)

    def step(self) -> None:
        self.cohort.step(self.span, self.number % STEPS)
        self.number += 1

    def gradients(self) -> list[Values]:
        """Return what a step leaves behind it; values and optimiser are put back."""
        stacked, optimizer = self.cohort.stacked, self.cohort.optimizer.torch
        values, state = stacked.values.clone(), copy.deepcopy(optimizer.state_dict())
        self.cohort.step(self.span, 0)
        stacked.values.copy_(values)
        optimizer.load_state_dict(state)
        return self._by_client(stacked.split(stacked.gradients.clone()))

    def values(self) -> list[Values]:
        return self._by_client(self.cohort.stacked.split(self.cohort.stacked.values))

    def _by_client(self, stacks: Values) -> list[Values]:
        """Return the clients' parts under the problem's names, in the problem's order."""
        named = {_full_name(name): stack for name, stack in stacks.items()}
        rows = {place: row for row, place in enumerate(self.cohort.places)}
        return [{name: stack[rows[client]] for name, stack in named.items()} for client in range(len(rows))]


def _job(problem: Problem, table: DenseTable, size: int, client: int) -> Job:
    values = problem.starts[client]
    factors = {matrix: (values[f"{matrix}.lora_A"], values[f"{matrix}.lora_B"]) for matrix in problem.matrices}
    every = dict.fromkeys(problem.matrices, tuple(range(RANK)))
    return Job(
        Client(client, RANK, size),
        ClientStart(factors, every, problem.scale, "frozen"),
        {name: value for name, value in values.items() if name.startswith(f"{problem.head}.")},
        Split(table, Split.whole(table).rows[client * size : (client + 1) * size]),
        STEPS,
        LEARNING_RATE,
        Source(0, 1, client),
    )


def _settings(batch_size: int) -> Any:
    """The training table of a run's configuration, which this machine need not have the libraries to read."""
    return SimpleNamespace(
        optimizer="adamw", weight_decay=WEIGHT_DECAY, batch_size=batch_size, max_grad_norm=0.0, weighting="uniform"
    )


def _full_name(name: str) -> str:
    kind, _, rest = name.partition("/")
    return rest if kind == "head" else f"{rest}.lora_{kind}"
