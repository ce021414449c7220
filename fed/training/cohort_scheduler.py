"""How the clients of a round are divided into cohorts: as many as asked for, as fit, or as measure fastest."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fed.errors import FedError
from fed.models.shared_model import SharedModel
from fed.training.cohort import train_together
from fed.training.compiled_loss import CompiledLosses
from fed.training.local import Job, batch_rows
from fed.training.memory import MIB, state_bytes, tensor_bytes
from fed.types import ClientUpdate

if TYPE_CHECKING:
    from fed.config import RunConfig

SIZES = (1, 2, 5, 10, 20, 50, 100)  # those that are tried
TRIAL_STEPS, TRIALS = 2, 2  # of which the faster counts
ENOUGH = 1.1  # two sizes in a row this much slower than the best end the trials: larger ones only get slower


class CohortScheduler:
    """Trains a round's clients a cohort at a time; `size` is how many there are in one, None until that is measured."""

    def __init__(
        self, shared: SharedModel, config: RunConfig, on_event: Callable[[str], object], size: int | None = None
    ) -> None:
        """`size` is what an earlier part of the run settled on, if the configuration leaves it to be measured."""
        self._shared, self._config, self._on_event = shared, config, on_event
        self.size = config.clients_per_pass or size
        self._token_bytes: dict[int, float] = {}  # of a batch's activations, a column of tokens, by its samples
        self._compiled = CompiledLosses(on_event) if config.cohort_compile else None

    def train(self, jobs: Sequence[Job]) -> list[ClientUpdate]:
        """Train every job's client and return their updates in order; see `fed.training.cohort.train_together`.

        Raises FedError where `cohort_memory_mib` does not hold one client.
        """
        updates: dict[int, ClientUpdate] = {}
        for places in self.divide(jobs):
            trained = train_together(
                self._shared,
                [jobs[place] for place in places],
                self._config.train,
                self._config.measure.memory,
                self._compiled,
            )
            updates |= zip(places, trained, strict=True)
        return [updates[place] for place in range(len(jobs))]

    def divide(self, jobs: Sequence[Job]) -> Iterator[list[int]]:
        """Yield the places of each cohort's jobs: clients of as many steps and as large factors go together."""
        order = sorted(range(len(jobs)), key=lambda place: (-jobs[place].steps, -_modules(jobs[place])))
        budget = self._config.cohort_memory_mib * MIB
        needs = self._needs(jobs) if budget else [0] * len(jobs)
        room = budget - self._fixed_bytes() if budget else 0
        if self.size is None:
            most = _fitting([needs[place] for place in order], room)
            self.size = self._fastest([jobs[place] for place in order[:most]])
        cohort: list[int] = []
        for place in order:
            if cohort and (len(cohort) == self.size or sum(needs[other] for other in (*cohort, place)) > room):
                yield cohort
                cohort = []
            cohort.append(place)
        yield cohort

    def _fixed_bytes(self) -> int:
        layers = self._shared.handle.layers.values()
        own = {id(factor) for layer in layers for factor in (layer.lora_A, layer.lora_B)}
        model = self._shared.model
        return tensor_bytes(tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own)

    def _needs(self, jobs: Sequence[Job]) -> list[int]:
        """Return each client's bytes: its numbers, their gradients and optimiser state, and its batch's activations."""
        needs = []
        longest = max(int(job.split.table.lengths(job.split.rows).max()) for job in jobs)
        for job in jobs:
            factors = [factor for pair in job.start.factors.values() for factor in pair]
            # A compiled cohort holds R modules a client, whoever it is.
            places = max(_modules(job), 0 if self._compiled is None else self._shared.rank)
            numbers = sum(map(Tensor.numel, factors)) * places // _modules(job)
            numbers += sum(map(Tensor.numel, job.head.values()))
            width = factors[0].element_size()
            state = state_bytes(self._config.train, numbers, len(factors) + len(job.head), width)
            needs.append(2 * numbers * width + state + self._activations(job, longest))
        fixed, budget = self._fixed_bytes(), self._config.cohort_memory_mib * MIB
        for job, need in zip(jobs, needs, strict=True):
            if fixed + need > budget:
                raise FedError(
                    f"cohort_memory_mib is {self._config.cohort_memory_mib:g}: the base takes {fixed / MIB:.1f} MiB "
                    f"and client {job.client.id} alone {need / MIB:.1f}; it should be at least "
                    f"{(fixed + need) / MIB:.1f}"
                )
        return needs

    def _activations(self, job: Job, longest: int) -> int:
        """Return the bytes a client's batch takes where texts are padded to `longest` tokens."""
        samples = self._config.train.batch_size
        if self._compiled is None:  # else batches are full
            samples = min(samples, len(job.split))
        if samples not in self._token_bytes:
            (update,) = train_together(self._shared, [job._replace(steps=1)], self._config.train, True, self._compiled)
            assert update.footprint is not None  # measured
            (first,) = batch_rows(len(job.split), samples, 1, job.rng)
            padded = int(job.split.lengths(first).max())
            self._token_bytes[samples] = update.footprint.activation_bytes / padded
        return math.ceil(self._token_bytes[samples] * longest)

    def _fastest(self, jobs: Sequence[Job]) -> int:
        """Return the size at which a client's step takes least, of those up to `len(jobs)`; say so."""
        brief = [job._replace(steps=min(job.steps, TRIAL_STEPS)) for job in jobs]
        tried: dict[int, float] = {}
        train_together(self._shared, brief[:1], self._config.train)  # what only the first run takes
        for size in sorted({min(size, len(brief)) for size in SIZES}):
            try:
                seconds = min(self._seconds(brief[:size]) for _ in range(TRIALS))
            except torch.OutOfMemoryError:
                if not tried:
                    raise
                break
            tried[size] = seconds / sum(job.steps for job in brief[:size])
            if min(list(tried.values())[-2:]) > ENOUGH * min(tried.values()):
                break
        best = min(tried, key=lambda size: tried[size])
        others = ", ".join(f"{size}: {1e3 * took:.2f}" for size, took in tried.items())
        self._on_event(f"cohorts of {best} clients measure fastest here (ms a client's step: {others})")
        return best

    def _seconds(self, jobs: Sequence[Job]) -> float:
        device = self._shared.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        train_together(self._shared, jobs, self._config.train)  # reads the losses at the end, so all is done
        return time.perf_counter() - began


def _modules(job: Job) -> int:
    return max(A.shape[0] for A, _ in job.start.factors.values())


def _fitting(needs: Sequence[int], room: float) -> int:
    """Return how many of these clients, in order, fit into one cohort."""
    return sum(total <= room for total in itertools.accumulate(needs))
