"""Local training of several clients at once, a cohort: one frozen base, one joint batch, separate modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import plora_kernels as pk
from fed import interruption
from fed.data.tables import IGNORED
from fed.errors import FedError
from fed.models.shared_model import SharedModel
from fed.seeding import torch_seed
from fed.training.local import BatchOrder, Job, ended_with
from fed.training.losses import client_losses
from fed.training.memory import SavedTensors, state_bytes
from fed.training.stacked_head import stacked_head
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


class _Plan:
    """A job with the table rows of its batches, of `size` rows each.

    The last `unused` rows of each batch are padding, which does not count in the loss.
    """

    def __init__(self, job: Job, batch_size: int, full: bool) -> None:
        """Prepare to draw the batches; with `full`, pad them to `batch_size` rows if the client has fewer samples."""
        self.job = job
        self._batches = BatchOrder(len(job.split), batch_size, job.rng)
        self.unused = batch_size - self._batches.width if full else 0
        self.size = self._batches.width + self.unused

    def rows(self, step: int) -> Tensor:
        """Return the table rows of a step's batch, (size,) int64."""
        rows = self.job.split.rows[self._batches.rows(step)]
        return torch.cat([rows, rows[:1].expand(self.unused)]) if self.unused else rows

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: plans with more steps come first, and among these plans with larger batches."""
        return -self.job.steps, -self.size


class Cohort:
    """Clients that train together, sorted by decreasing number of steps.

    The clients that are still training are thus always the first ones.
    """

    def __init__(
        self, shared: SharedModel, jobs: Sequence[Job], settings: TrainConfig, compiled: CompiledLosses | None = None
    ) -> None:
        # A step is compiled for fixed shapes, so compiled cohorts get the same ones: full batches, at least R modules.
        plans = [_Plan(job, settings.batch_size, full=compiled is not None) for job in jobs]
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
        with span.seeded(step):  # for the backward too, because gradient checkpointing repeats the forward in it
            with self.saved.watching(measure):
                batch = span.batch(step)
                if self.compiled is None or measure:  # saved tensors cannot be counted in a compiled forward
                    losses = client_losses(self.shared.model, batch, span.sizes)
                else:
                    losses = self.compiled(self.shared.model, batch, span.sizes, span.own_gradients)
            self._move(losses, span)
        return losses.detach()

    def _spans(self) -> Iterator[tuple[range, int]]:
        """Yield consecutive ranges of steps, each with the number of clients that train in all of its steps."""
        begun = 0
        for steps in sorted({job.steps for job in self.jobs}):
            yield range(begun, steps), sum(job.steps >= steps for job in self.jobs)
            begun = steps

    def _move(self, losses: Tensor, span: CohortSteps) -> None:
        """Compute the gradients of each client's loss, clip each client's separately and take the optimiser's step."""
        count, most = len(span.sizes), self.settings.max_grad_norm
        penalty = span.penalty()
        objective = (losses if penalty is None else losses + penalty).sum()
        unused = span.differentiate(objective)
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
            found[place] = ended_with(plan.job, self.settings, factors, head, loss / plan.job.steps, taken)
        return [found[place] for place in range(len(self.jobs))]

    def _footprint(
        self, factors: Mapping[str, Factors], head: Mapping[str, Tensor], activation_bytes: int
    ) -> Footprint:
        trained = [pair["AB".index(side)] for pair in factors.values() for side in self.sides] + list(head.values())
        numbers = sum(map(Tensor.numel, trained))
        state = state_bytes(self.settings, numbers, len(trained), self.stacked.values.element_size())
        return Footprint(numbers, state, activation_bytes)


class CohortSteps:
    """A range of steps of a cohort in which its first `count` clients train."""

    def __init__(self, cohort: Cohort, count: int) -> None:
        self._cohort, self._plans = cohort, cohort.plans[:count]
        self.sizes = [plan.size for plan in self._plans]
        self.trained = cohort.stacked.leaves(count)
        self.gradients = {name: own[:count] for name, own in cohort.stacked.named(cohort.stacked.gradients).items()}
        self._leaves = self.trained | {name: stack[:count] for name, stack in cohort.fixed.items()}
        self._rows = pk.RowGroups(self.sizes)
        self._unused: Tensor | None = None  # (samples,) bool: which samples of a batch are padding
        if any(plan.unused for plan in self._plans):
            unused = [torch.arange(plan.size) >= plan.size - plan.unused for plan in self._plans]
            self._unused = torch.cat(unused).to(cohort.shared.device)
        scales = [plan.job.start.scale for plan in self._plans]
        self._groups = {}
        for matrix, layer in cohort.shared.handle.layers.items():
            # Only dropout needs the selection in the layer. Without dropout the gradients of unselected modules are
            # set to zero after the backward, for all layers at once, which costs less.
            mask = cohort.masks[matrix] if layer.dropout else None
            selected = None if mask is None else mask[:count]
            A, B = self._leaves[f"A/{matrix}"], self._leaves[f"B/{matrix}"]
            gradients = self.gradients.get(f"A/{matrix}"), self.gradients.get(f"B/{matrix}")
            self._groups[matrix] = pk.GroupModules.of(self._rows, A, B, selected, scale=scales, gradients=gradients)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context, make the model compute with these clients' modules and heads."""
        shared = self._cohort.shared
        head = {name.removeprefix("head/"): leaf for name, leaf in self._leaves.items() if name.startswith("head/")}
        with (
            shared.handle.grouped(self._groups),
            stacked_head(shared.model, shared.handle.saved_modules, head, self.sizes),
        ):
            yield

    def differentiate(self, loss: Tensor) -> list[str]:
        """Write the gradients of `loss` to the cohort's `stacked`; return the parameters it does not depend on."""
        heads = [name for name in self.trained if name.startswith("head/")]
        found, idle = pk.group_gradients(loss, self._groups, [self.trained[name] for name in heads])
        unused = [f"{side}/{matrix}" for matrix in idle for side in self._cohort.sides]
        for name, gradient in zip(heads, found, strict=True):
            if gradient is None:
                unused.append(name)
                self.gradients[name].zero_()
            else:
                self.gradients[name].copy_(gradient)
        return unused

    def own_gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Return copies of the gradients of `loss`, (count, …) by name, for all trained parameters it depends on."""
        unused = self.differentiate(loss)
        return {name: own.clone() for name, own in self.gradients.items() if name not in unused}

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return all clients' samples of a step as one batch, with the labels of padding set to IGNORED."""
        batch = self._cohort.table.batch(torch.cat([plan.rows(step) for plan in self._plans]))
        if self._unused is not None:
            labels = batch["labels"]
            batch["labels"] = labels.masked_fill(self._unused.view(-1, *[1] * (labels.dim() - 1)), IGNORED)
        return batch

    @contextmanager
    def seeded(self, step: int) -> Iterator[None]:
        """Within the context, give every layer with LoRA dropout its clients' seeds for one step.

        Each client's dropout mask is thus the same as when it trains alone.
        """
        layers = self._cohort.shared.handle.layers
        if not any(layer.dropout for layer in layers.values()):
            yield
            return
        table = self._cohort.table
        lengths = [int(table.lengths(plan.rows(step)).max()) for plan in self._plans]
        rows = pk.RowGroups(self.sizes, lengths)
        seeds = [
            [plan.job.rng.seed_for("lora dropout", step, matrix) for plan in self._plans] for matrix in self._groups
        ]
        device_seeds = torch.tensor(seeds).to(self._cohort.shared.device, non_blocking=True)
        groups = {
            matrix: replace(self._groups[matrix], rows=rows, dropout_p=layers[matrix].dropout, dropout_seeds=own)
            for matrix, own in zip(self._groups, device_seeds, strict=True)
        }
        with self._cohort.shared.handle.grouped(groups):
            yield

    def penalty(self) -> Tensor | None:
        """Return each client's λ Σ_matrices ‖A[first:]‖_F ‖B[:, first:]‖_F, (count,), or None if no client has one.

        The entry of a client without a penalty is 0.
        """
        penalties = [plan.job.start.penalty for plan in self._plans]
        if not any(penalties):
            return None
        device, dtype = self._cohort.stacked.values.device, self._cohort.stacked.values.dtype
        weights = torch.tensor([0.0 if one is None else one.weight for one in penalties], dtype=dtype)
        firsts = torch.tensor([0 if one is None else one.first for one in penalties])
        total = torch.zeros(len(penalties), dtype=dtype, device=device)
        for matrix in self._groups:
            A, B = self._leaves[f"A/{matrix}"], self._leaves[f"B/{matrix}"]
            tail = (torch.arange(A.shape[1]) >= firsts[:, None]).to(device, non_blocking=True)  # (count, R)
            ends = A.masked_fill(~tail[:, :, None], 0.0), B.masked_fill(~tail[:, None], 0.0)
            size_A, size_B = (torch.linalg.vector_norm(end, dim=(1, 2)) for end in ends)
            total = total + size_A * size_B
        return weights.to(device, non_blocking=True) * total


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
