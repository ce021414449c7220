"""Local training of several clients at once, a cohort: one frozen base, one joint batch, separate modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fed import interruption
from fed.data.tables import InstructionTable
from fed.errors import FedError
from fed.models.shared_model import SharedModel
from fed.seeding import torch_seed
from fed.training.batching import find_way, way_of_cohort
from fed.training.cohort_steps import CohortSteps, Plan
from fed.training.local import Job, ended_with
from fed.training.losses import client_losses
from fed.training.memory import SavedTensors, state_bytes
from fed.training.stacked_optimizer import Stacked, StackedOptimizer
from fed.types import ClientUpdate, Factors, Footprint

if TYPE_CHECKING:
    from fed.config.training import TrainConfig
    from fed.training.compiled_loss import CompiledLosses

WIDE = 256  # number of input features from which storing A column by column makes products with it faster


def train_together(
    shared: SharedModel,
    jobs: Sequence[Job],
    settings: TrainConfig,
    measure: bool = False,
    compiled: CompiledLosses | None = None,
) -> list[ClientUpdate]:
    """Train all jobs' clients together, with one forward and one backward per step; return their updates in order.

    Each client's update equals that of `fed.training.local.train` up to rounding: data order and LoRA dropout are drawn
    from the client's own streams, the loss is the sum of the clients' mean losses, and gradient clipping, learning
    rate, optimiser state and number of steps are separate for each client. A client that has taken all its steps leaves
    the batch and no longer changes; a client whose loss is not finite does not affect the others. Unselected modules
    are held frozen, whatever `start.unselected` is. Dropout of the base model itself draws from one stream for the
    whole cohort, so with it the results depend on which clients train together.

    With `compiled` torch compiles the steps. The server's `base_delta` must already be folded into the shared base. The
    model's modules are restored at the end. Nothing is read from the device before the last step is done, except to
    check newly compiled steps.

    Raises FedError for a model in which the result of one sample depends on others (batch norm).
    """
    check_independent(shared.model)
    cohort = Cohort(shared, jobs, settings, compiled)
    total = cohort.train(measure)
    return cohort.updates(total, measure)


def check_independent(model: nn.Module) -> None:
    """Raise FedError for batch norm, which would mix clients because a sample's result depends on the whole batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise FedError(
                f"{name} is {type(module).__name__}: in training it mixes the samples of a batch, and so the clients "
                "of a cohort; execution = 'sequential' trains them apart"
            )


def check_cohorts(shared: SharedModel) -> None:
    """Raise FedError if clients cannot train together on this model: it mixes them, or what is trained has two dtypes.

    A cohort keeps all that its clients train in one tensor.
    """
    check_independent(shared.model)
    factors = {factor.dtype for pair in shared.handle.factors().values() for factor in pair}
    if others := {parameter.dtype for parameter in shared.head.values()} - factors:
        own, head = (str(next(iter(dtypes))).removeprefix("torch.") for dtypes in (factors, others))
        raise FedError(
            f"the adapter is {own} and the trained head {head}: a cohort needs one dtype; adapter.dtype = {head!r}, "
            "train.head = 'freeze' or execution = 'sequential' would be right"
        )


class Cohort:
    """Clients that train together, sorted by decreasing number of steps.

    The clients that are still training are thus always the first ones.
    """

    def __init__(
        self, shared: SharedModel, jobs: Sequence[Job], settings: TrainConfig, compiled: CompiledLosses | None = None
    ) -> None:
        # A step is compiled for fixed shapes, so compiled cohorts get the same ones: full batches, at least R modules.
        plans = [Plan(job, settings.batch_size, full=compiled is not None) for job in jobs]
        rank = 0 if compiled is None else shared.rank
        self.places = sorted(range(len(jobs)), key=lambda place: plans[place].order)
        self.plans = [plans[place] for place in self.places]
        self.jobs = [plan.job for plan in self.plans]
        self.shared, self.settings, self.compiled = shared, settings, compiled
        self.table = self.jobs[0].split.table
        self.sides = self.jobs[0].start.trained
        if any(job.split.table is not self.table or job.start.trained != self.sides for job in self.jobs):
            raise ValueError("the jobs of a cohort hold rows of one table and train the same factors")
        factors = {
            f"{side}/{matrix}": stack
            for matrix in shared.handle.layers
            for side, stack in zip("AB", _stack([job.start.factors[matrix] for job in self.jobs], rank), strict=True)
        }
        heads = {f"head/{name}": torch.stack([job.head[name] for job in self.jobs]) for name in shared.head}
        self.fixed = {name: stack for name, stack in factors.items() if name[0] not in self.sides}
        trained = {name: stack for name, stack in factors.items() if name not in self.fixed}
        columns = [name for name, stack in trained.items() if name[0] == "A" and _is_wide(stack)]
        self.stacked = Stacked(trained | heads, columns)
        self.masks = {
            matrix: _mask([job.start.selected[matrix] for job in self.jobs], factors[f"A/{matrix}"])
            for matrix in shared.handle.layers
        }
        self.optimizer: StackedOptimizer | None = None  # made after the first backward
        self.untrained: Tensor | None = None  # bool, laid out as `stacked.values`: elements that no client trains
        self.saved = SavedTensors(shared.model, (self.stacked.values, *self.fixed.values()))
        self.drops = any(layer.dropout for layer in shared.handle.layers.values())
        # The rows' numbers for dropout are known for the layers of language models, which all see every token.
        whole = compiled is not None or (self.drops and not isinstance(self.table, InstructionTable))
        self.way = way_of_cohort(find_way(settings, shared.model, self.table, whole), shared.model, self.table)

    def _make_optimizer(self, unused: Sequence[str]) -> StackedOptimizer:
        """Return the optimiser, and set `untrained` unless everything is trained.

        Parameters in `unused`, which the loss does not depend on, are not trained: when a client trains alone their
        gradient is None, and the optimiser does not move them either.
        """
        trained: Tensor | None = None
        if unused or any(mask is not None for mask in self.masks.values()):
            trained = torch.ones_like(self.stacked.values, dtype=torch.bool)
            for name, part in self.stacked.named(trained).items():
                kind, _, matrix = name.partition("/")
                mask = self.masks[matrix] if kind in "AB" else None
                if name in unused:
                    part.fill_(False)
                elif mask is not None:
                    own = mask.to(part.device, non_blocking=True)
                    part &= own[:, :, None] if kind == "A" else own[:, None, :]
            self.untrained = ~trained
        return StackedOptimizer(self.stacked, self.settings, [job.learning_rate for job in self.jobs], trained)

    def train(self, measure: bool) -> Tensor:
        """Train all clients for all their steps; return the sum of each client's losses over its steps, (C,)."""
        first_job = self.jobs[0]
        total = torch.zeros(len(self.jobs), device=self.shared.device)
        key = [first_job.rng.seed, first_job.rng.round, *(job.client.id for job in self.jobs)]
        self.shared.model.train()
        with torch_seed(self.shared.device, *key, "cohort's dropout"):
            for steps, count in self._spans():
                span = CohortSteps(self, count)
                with span.running():
                    for step in steps:
                        interruption.check()
                        total[:count] += self.step(span, step, measure and step == 0)
        return total

    def step(self, span: CohortSteps, step: int, measure: bool = False) -> Tensor:
        """Train the clients of a running span for one step; return their losses before it, (count,)."""
        parts = span.parts(step)
        total: Tensor | None = None
        unused: set[str] = set()
        for number, part in enumerate(parts):
            with span.reading(part, step):  # the backward too: gradient checkpointing repeats the forward in it
                with self.saved.watching(measure):
                    if self.compiled is None or measure:  # saved tensors cannot be counted in a compiled forward
                        losses = client_losses(self.shared.model, part.batch, part.sizes, part.counted)
                    else:
                        losses = self.compiled(
                            self.shared.model, part.batch, part.sizes, span.own_gradients, part.counted
                        )
                    if part.shares is not None:
                        losses = losses * part.shares.to(losses, non_blocking=True)
                penalty = span.penalty() if number == 0 else None
                own = set(span.differentiate((losses if penalty is None else losses + penalty).sum()))
            if total is None:
                total, unused = losses.detach(), own
            else:
                total, unused = total + losses.detach(), unused & own
            if len(parts) > 1:
                self._sum_gradients(number, len(parts))
        assert total is not None  # because a batch has at least one part
        self._move(span, sorted(unused))
        return total

    def _sum_gradients(self, number: int, parts: int) -> None:
        """Add the gradients of a part to those of the parts before; after the last one put the sum in their place."""
        if number == 0:
            self.sum_of_parts = self.stacked.gradients.clone()
        else:
            self.sum_of_parts += self.stacked.gradients
        if number == parts - 1:
            self.stacked.gradients.copy_(self.sum_of_parts)

    def _spans(self) -> Iterator[tuple[range, int]]:
        """Yield consecutive ranges of steps, each with the number of clients that train in all of its steps."""
        begun = 0
        for steps in sorted({job.steps for job in self.jobs}):
            yield range(begun, steps), sum(job.steps >= steps for job in self.jobs)
            begun = steps

    def _move(self, span: CohortSteps, unused: Sequence[str]) -> None:
        """Clip each client's gradients separately and take the optimiser's step.

        The loss does not depend on the parameters `unused`.
        """
        count, most = len(span.sizes), self.settings.max_grad_norm
        if self.optimizer is None:  # only the first backward shows which parameters the loss does not depend on
            self.optimizer = self._make_optimizer(unused)
        if self.untrained is not None:
            self.stacked.gradients.masked_fill_(self.untrained, 0.0)
        if most > 0:
            self.stacked.clip_(count, most)
        self.optimizer.step(count)

    def updates(self, total: Tensor, measure: bool) -> list[ClientUpdate]:
        """Return the clients' updates in the order of the jobs passed to `__init__`."""
        samples, values = sum(plan.size for plan in self.plans), self.stacked.named(self.stacked.values)
        found: dict[int, ClientUpdate] = {}
        for number, (place, plan, loss) in enumerate(zip(self.places, self.plans, total.tolist(), strict=True)):
            ended = {name: stack[number] for name, stack in (values | self.fixed).items()}
            factors = {}
            for matrix, chosen in plan.job.start.selected.items():
                modules = torch.tensor(chosen, dtype=torch.int64, device=self.shared.device)
                A, B = ended[f"A/{matrix}"], ended[f"B/{matrix}"]
                factors[matrix] = A.index_select(0, modules), B.index_select(1, modules)
            head = {name: ended[f"head/{name}"].clone() for name in self.shared.head}
            own_share = self.saved.size_bytes * plan.size // samples
            taken = self._footprint(factors, head, own_share) if measure else None
            update = ended_with(plan.job, self.settings, factors, head, loss / plan.job.steps, taken)
            found[place] = replace(update, tokens=plan.tokens, positions=plan.positions)
        return [found[place] for place in range(len(self.jobs))]

    def _footprint(
        self, factors: Mapping[str, Factors], head: Mapping[str, Tensor], activation_bytes: int
    ) -> Footprint:
        trained = [pair["AB".index(side)] for pair in factors.values() for side in self.sides] + list(head.values())
        numbers = sum(map(Tensor.numel, trained))
        state = state_bytes(self.settings, numbers, len(trained), self.stacked.values.element_size())
        return Footprint(numbers, state, activation_bytes)


def _stack(factors: Sequence[Factors], fewest: int) -> Factors:
    """Stack the clients' A (m, K) and B (N, m) to (C, R, K) and (C, N, R), padded with zeros where m < R.

    R is the largest m of the clients, but at least `fewest`.
    """
    most = max(fewest, *(A.shape[0] for A, _ in factors))
    if all(A.shape[0] == most for A, _ in factors):
        return torch.stack([A for A, _ in factors]), torch.stack([B for _, B in factors])
    first_A, first_B = factors[0]
    stacked_A = first_A.new_zeros(len(factors), most, first_A.shape[1])
    stacked_B = first_B.new_zeros(len(factors), first_B.shape[0], most)
    for client, (A, B) in enumerate(factors):
        stacked_A[client, : A.shape[0]], stacked_B[client, :, : A.shape[0]] = A, B
    return stacked_A, stacked_B


def _is_wide(stacked_A: Tensor) -> bool:
    """Return whether to store A (C, R, K) column by column, which makes x·Aᵀ of a few rows 3 times as fast on CPU."""
    return stacked_A.device.type == "cpu" and stacked_A.shape[2] >= WIDE


def _mask(chosen: Sequence[Sequence[int]], stacked_A: Tensor) -> Tensor | None:
    """Return which modules of a matrix each client trains, (C, R) bool on the CPU, or None if all clients train all."""
    rank = stacked_A.shape[1]
    if all(len(indices) == rank for indices in chosen):
        return None
    mask = torch.zeros(len(chosen), rank, dtype=torch.bool)
    for client, indices in enumerate(chosen):
        mask[client, list(indices)] = True
    return mask
