"""The steps of a cohort in which the same clients train: their leaves, batches, gradients and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

import plora_kernels as pk
from fed.data.tables import IGNORED, Table
from fed.models.shared_model import SharedModel
from fed.training.batching import Part, Way, divide
from fed.training.local import BatchOrder, Job
from fed.training.stacked_head import HeadRows, stacked_head
from fed.training.stacked_optimizer import Stacked


class Plan:
    """A job with the table rows of its batches, of `size` rows each.

    The last `unused` rows of each batch are padding, which does not count in the loss.
    """

    def __init__(self, job: Job, batch_size: int, full: bool) -> None:
        """Prepare to draw the batches; with `full`, pad them to `batch_size` rows if the client has fewer samples."""
        self.job = job
        self._batches = BatchOrder(len(job.split), batch_size, job.rng)
        self.unused = batch_size - self._batches.width if full else 0
        self.size = self._batches.width + self.unused
        self.tokens = self.positions = 0  # so far: see `fed.types.ClientUpdate`

    def rows(self, step: int) -> Tensor:
        """Return the table rows of a step's batch, (size,) int64."""
        rows = self.job.split.rows[self._batches.rows(step)]
        self.tokens += int(self.job.split.table.lengths(rows).sum())
        return torch.cat([rows, rows[:1].expand(self.unused)]) if self.unused else rows

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: plans with more steps come first, and among these plans with larger batches."""
        return -self.job.steps, -self.size


class Members(Protocol):
    """What the steps of a cohort use of it: see `fed.training.cohort.Cohort`, which is one."""

    shared: SharedModel
    plans: list[Plan]
    table: Table
    sides: str
    stacked: Stacked
    fixed: dict[str, Tensor]
    masks: dict[str, Tensor | None]
    way: Way
    drops: bool


class CohortSteps:
    """A range of steps of a cohort in which its first `count` clients train."""

    def __init__(self, cohort: Members, count: int) -> None:
        self._cohort, self._plans = cohort, cohort.plans[:count]
        self.sizes = [plan.size for plan in self._plans]
        self.trained = cohort.stacked.leaves(count)
        self.gradients = {name: own[:count] for name, own in cohort.stacked.named(cohort.stacked.gradients).items()}
        self._leaves = self.trained | {name: stack[:count] for name, stack in cohort.fixed.items()}
        self._rows = pk.RowGroups(self.sizes)
        self._head_rows = HeadRows(self.sizes)
        self._latest = list[Tensor]()  # the table rows of each client's batch in the step that runs
        self._unused: Tensor | None = None  # (samples,) bool on the CPU: which samples of a batch are padding
        if any(plan.unused for plan in self._plans):
            unused = [torch.arange(plan.size) >= plan.size - plan.unused for plan in self._plans]
            self._unused = torch.cat(unused)
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
            stacked_head(shared.model, shared.handle.saved_modules, head, self._head_rows),
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

    def parts(self, step: int) -> list[Part]:
        """Return the parts of all clients' batches of a step; the samples that only fill up a batch do not count."""
        self._latest = [plan.rows(step) for plan in self._plans]
        parts = divide(self._cohort.table, self._latest, self._cohort.way)
        for part in parts:
            for plan, positions in zip(self._plans, part.positions, strict=True):
                plan.positions += positions
        if self._unused is None:
            return parts
        (part,) = parts  # compiled, and so padded
        labels, counted = part.batch["labels"], part.counted
        unused = self._unused.to(labels.device, non_blocking=True)
        part.batch["labels"] = labels.masked_fill(unused.view(-1, *[1] * (labels.dim() - 1)), IGNORED)
        if counted is not None:
            part = part._replace(counted=counted[~self._unused[counted // labels.shape[1]]])
        return [part]

    @contextmanager
    def reading(self, part: Part, step: int) -> Iterator[None]:
        """Within the context the model computes a part: every layer knows its rows, and their dropout for one step.

        Each client's dropout mask is thus the same as when it trains alone.
        """
        cohort = self._cohort
        is_whole = part.sizes == self.sizes
        if is_whole and not cohort.drops:
            yield
            return
        layers = cohort.shared.handle.layers
        if part.numbers is None:
            lengths = [int(cohort.table.lengths(own).max()) for own in self._latest] if cohort.drops else None
            rows = pk.RowGroups(part.sizes, lengths)
        else:
            rows = pk.RowGroups(part.sizes, numbers=part.numbers)
        groups = {matrix: replace(own, rows=rows) for matrix, own in self._groups.items()}
        if cohort.drops:
            seeds = [[plan.job.rng.seed_for("lora dropout", step, matrix) for plan in self._plans] for matrix in groups]
            device_seeds = torch.tensor(seeds).to(cohort.shared.device, non_blocking=True)
            groups = {
                matrix: replace(groups[matrix], dropout_p=layers[matrix].dropout, dropout_seeds=own)
                for matrix, own in zip(groups, device_seeds, strict=True)
            }
        with cohort.shared.handle.grouped(groups), self._head_rows.of(part.sizes):
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
