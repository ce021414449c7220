"""The simulator's cohort executor, one step at a time."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch

from bench.simulation.cases import RANK
from bench.simulation.problem import LEARNING_RATE, PADDING, WEIGHT_DECAY, Problem, Values
from bench.simulation.resident import injected
from fed.data.tables import IGNORED, DenseTable, InstructionTable, Sequences, Split
from fed.models.shared_model import SharedBase, SharedModel
from fed.seeding import ClientRandom
from fed.training.cohort import Cohort
from fed.training.cohort_steps import CohortSteps
from fed.training.compiled_loss import COMPARED_STEPS, CompiledLosses
from fed.training.local import Job
from fed.types import Client, ClientStart

# Every client has one batch, with another order of rows at each of so many steps, which then repeat.
STEPS = 16


class CohortTrainer:
    """Trains all clients in one forward and one backward, as a round of the simulator does."""

    def __init__(self, problem: Problem, compiled: CompiledLosses | None = None) -> None:
        """With `compiled` torch compiles the steps."""
        self.compiled = compiled
        handle = injected(problem)
        head = {
            f"{module}.{name}": parameter
            for module in problem.heads
            for name, parameter in handle.model.get_submodule(module).named_parameters()
        }
        device = next(handle.model.parameters()).device
        self.shared = SharedModel(handle.model, handle, head, device, SharedBase(handle.layers), RANK)
        self.problem, self.table = problem, _table(problem.joined())
        self.cohort, self.number = self._make_cohort(list(problem.starts)), 0
        self.span = CohortSteps(self.cohort, len(problem.starts))
        self.running = ExitStack()  # a round enters this once for all its steps
        self.running.enter_context(self.span.running())
        weakref.finalize(self, self.running.close)

    def step(self) -> None:
        self.cohort.step(self.span, self.number % STEPS)
        self.number += 1

    def gradients(self) -> list[Values]:
        """Return the gradients of the first step of another cohort that starts from these values."""
        other = self._make_cohort(self.values())
        span = CohortSteps(other, len(other.jobs))
        self.running.close()  # the other cohort uses the model meanwhile
        with span.running():
            other.step(span, 0)
        self.running.enter_context(self.span.running())
        return _by_client(other, other.stacked.named(other.stacked.gradients))

    def values(self) -> list[Values]:
        return _by_client(self.cohort, self.cohort.stacked.named(self.cohort.stacked.values))

    def _make_cohort(self, values: list[Values]) -> Cohort:
        size = len(self.table) // len(values)
        jobs = [self._job(client, own, size) for client, own in enumerate(values)]
        return Cohort(self.shared, jobs, _settings(size), self.compiled)

    def _job(self, client: int, values: Values, size: int) -> Job:
        matrices, heads = self.problem.matrices, tuple(f"{name}." for name in self.problem.heads)
        factors = {matrix: (values[f"{matrix}.lora_A"], values[f"{matrix}.lora_B"]) for matrix in matrices}
        return Job(
            Client(client, RANK, size),
            ClientStart(factors, dict.fromkeys(matrices, tuple(range(RANK))), self.problem.scale, "frozen"),
            {name: value for name, value in values.items() if heads and name.startswith(heads)},
            Split(self.table, torch.arange(client * size, (client + 1) * size)),
            STEPS,
            LEARNING_RATE,
            ClientRandom(0, 1, client),
        )


def compiled(problem: Problem) -> CohortTrainer:
    """Return the same with the forward compiled, and the backward with it: `cohort_compile` of a run."""
    torch.compiler.reset()  # graphs of other cases would count towards the limit of recompilations
    trainer = CohortTrainer(problem, CompiledLosses(_refuse))
    for _ in range(COMPARED_STEPS):  # timed steps are those that are no longer compared with plain ones
        trainer.gradients()
    return trainer


def _refuse(line: str) -> None:
    raise RuntimeError(line)


def _table(rows: Values) -> DenseTable | InstructionTable:
    """Return a cohort's rows as the simulator holds them, texts without padding."""
    labels = rows.pop("labels")
    if labels.dim() == 1:
        return DenseTable(rows, labels)
    texts, counted = rows["input_ids"], (labels != IGNORED).sum(1).cpu()
    lengths = (
        rows["attention_mask"].sum(1).cpu() if "attention_mask" in rows else torch.full_like(counted, texts.shape[1])
    )
    tokens = Sequences.of([row[:length] for row, length in zip(texts.tolist(), lengths.tolist(), strict=True)])
    padding = SimpleNamespace(pad_token_id=PADDING["input_ids"])
    return InstructionTable(tokens.to(labels.device), lengths - counted, (), padding, max_new_tokens=1)


def _by_client(cohort: Cohort, stacks: Values) -> list[Values]:
    """Return a stack's rows by the problem's names, in the order of the clients."""
    named = {_full_name(name): stack for name, stack in stacks.items()}
    rows = {place: row for row, place in enumerate(cohort.places)}
    return [{name: stack[rows[client]] for name, stack in named.items()} for client in range(len(rows))]


def _settings(batch_size: int) -> Any:
    """The training table of a run's configuration, without the libraries that read configurations."""
    return SimpleNamespace(
        optimizer="adamw",
        weight_decay=WEIGHT_DECAY,
        batch_size=batch_size,
        batching="auto",
        max_grad_norm=0.0,
        weighting="uniform",
    )


def _full_name(name: str) -> str:
    kind, _, rest = name.partition("/")
    return rest if kind == "head" else f"{rest}.lora_{kind}"
