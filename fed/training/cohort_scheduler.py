"""Division of a round's clients into cohorts, whose size is configured or measured, within a memory limit."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fed.config import RunConfig
from fed.data.tables import Split
from fed.errors import FedError
from fed.models.shared_model import SharedModel
from fed.training.cohort import train_together
from fed.training.compiled_loss import CompiledLosses
from fed.training.local import Job
from fed.training.memory import MIB, base_bytes, buffer_bytes, is_out_of_memory, state_bytes
from fed.types import ClientUpdate

SIZES = (1, 2, 5, 10, 20, 50, 100)  # sizes of cohorts to time
TRIAL_STEPS, TRIALS = 2, 2  # local steps of a trial, and trials of each size, of which the fastest counts
ENOUGH = 1.1  # the timing ends after two sizes in a row that are slower than the best by this factor


class CohortScheduler:
    """Trainer of a round's clients, a cohort at a time.

    `size` is the largest number of clients in a cohort; it is None until it has been measured.
    """

    def __init__(
        self, shared: SharedModel, config: RunConfig, on_event: Callable[[str], object], size: int | None = None
    ) -> None:
        """Take the size from the configuration, or else from `size`, which the run measured before it was resumed."""
        self._shared, self._config, self._on_event = shared, config, on_event
        self.size = config.clients_per_pass or size
        # Bytes of a batch's activations for each token of its padded length, by the number of samples in the batch.
        self._token_bytes: dict[int, float] = {}
        self._compiled = CompiledLosses(on_event) if config.cohort_compile else None

    def train(self, jobs: Sequence[Job]) -> list[ClientUpdate]:
        """Train the clients of all jobs and return their updates in order; see `fed.training.cohort.train_together`.

        Raises FedError if a client does not fit into `cohort_memory_mib` even alone, or a cohort runs out of memory.
        """
        updates: dict[int, ClientUpdate] = {}
        for places in self.divide(jobs):
            cohort = [jobs[place] for place in places]
            updates |= zip(places, self._train(cohort, self._config.measure.memory), strict=True)
        return [updates[place] for place in range(len(jobs))]

    def _train(self, jobs: Sequence[Job], measure: bool, batching: str = "") -> list[ClientUpdate]:
        """Train one cohort, with other `batching` than configured if it is given; raise FedError if memory runs out.

        A cohort that is too large is not divided, because clients' updates depend on their cohort by rounding, and
        the run's files would then depend on the machine's memory.
        """
        settings = self._config.train
        if batching:
            settings = settings.model_copy(update={"batching": batching})
        try:
            return train_together(self._shared, jobs, settings, measure, self._compiled)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        raise self._too_large(jobs)

    def _too_large(self, jobs: Sequence[Job]) -> FedError:
        if len(jobs) > 1:
            return FedError(
                f"round {jobs[0].rng.round}: {len(jobs)} clients in one cohort run out of memory; a clients_per_pass "
                f"below {len(jobs)}, or a cohort_memory_mib below the memory that is free, would be right"
            )
        return FedError(
            f"round {jobs[0].rng.round}: client {jobs[0].client.id} runs out of memory even alone, whatever "
            "clients_per_pass and cohort_memory_mib are; a smaller train.batch_size or "
            "train.gradient_checkpointing = true would be right"
        )

    def measure(self, jobs: Sequence[Job]) -> int:
        """Return `size`; if it is None, set it to the size with which clients such as these train fastest.

        Nothing is changed but time: the clients' updates are dropped, and the model and its random numbers are as
        before.
        """
        if self.size is None:
            order, needs, room = self._order(jobs)
            most = _fitting([needs[place] for place in order], room)
            self.size = self._fastest([jobs[place] for place in order[:most]])
        return self.size

    def divide(self, jobs: Sequence[Job]) -> Iterator[list[int]]:
        """Yield the indices into `jobs` of each cohort.

        Clients with similar numbers of steps and modules go together, so that a cohort stays full for most of its steps
        and pads few modules.
        """
        size = self.measure(jobs)
        order, needs, room = self._order(jobs)
        cohort: list[int] = []
        for place in order:
            if cohort and (len(cohort) == size or sum(needs[other] for other in (*cohort, place)) > room):
                yield cohort
                cohort = []
            cohort.append(place)
        yield cohort

    def _order(self, jobs: Sequence[Job]) -> tuple[list[int], list[int], float]:
        """Return the places of the jobs in the order of training, the bytes that each needs, and the bytes there are.

        Without a limit of memory nothing is needed.
        """
        order = sorted(range(len(jobs)), key=lambda place: (-jobs[place].steps, -_modules(jobs[place])))
        budget = self._config.cohort_memory_mib * MIB
        if not budget:
            return order, [0] * len(jobs), 0.0
        return order, self._needs(jobs), budget - self._fixed(jobs)

    def _fixed(self, jobs: Sequence[Job]) -> int:
        """Return the bytes that any cohort needs: the base, and a slice of logits or a weight that is dequantised."""
        samples = len(jobs) * self._config.train.batch_size
        return base_bytes(self._shared) + buffer_bytes(self._shared, jobs[0].split.table, samples)

    def _needs(self, jobs: Sequence[Job]) -> list[int]:
        """Return each client's bytes: parameters, gradients, optimiser state and the activations of a batch.

        Raises FedError if a client does not fit into `cohort_memory_mib` together with the base.
        """
        needs = []
        whole = Split.joined([job.split for job in jobs])
        for job in jobs:
            factors = [factor for pair in job.start.factors.values() for factor in pair]
            # A compiled cohort holds at least R modules for each client.
            places = max(_modules(job), 0 if self._compiled is None else self._shared.rank)
            numbers = sum(map(Tensor.numel, factors)) * places // _modules(job)
            numbers += sum(map(Tensor.numel, job.head.values()))
            width = factors[0].element_size()
            state = state_bytes(self._config.train, numbers, len(factors) + len(job.head), width)
            needs.append(2 * numbers * width + state + self._activations(job, whole))
        fixed, budget = self._fixed(jobs), self._config.cohort_memory_mib * MIB
        for job, need in zip(jobs, needs, strict=True):
            if fixed + need > budget:
                raise FedError(
                    f"cohort_memory_mib is {self._config.cohort_memory_mib:g}: the base takes {fixed / MIB:.1f} MiB "
                    f"and client {job.client.id} alone {need / MIB:.1f}; it should be at least "
                    f"{(fixed + need) / MIB:.1f}"
                )
        return needs

    def _activations(self, job: Job, whole: Split) -> int:
        """Return the bytes of the activations of a client's batch when it is padded to the longest of all rows."""
        samples = self._config.train.batch_size
        if self._compiled is None:  # compiled cohorts pad every batch to `batch_size` samples
            samples = min(samples, len(job.split))
        rows = whole.longest(samples)
        longest = int(rows.lengths(torch.tensor([0])))
        if samples not in self._token_bytes:
            # The longest rows, because attention may take memory by the square of their length. Padded, because rows of
            # equal length are not divided, and then a cohort needs most.
            (update,) = self._train([job._replace(steps=1, split=rows)], measure=True, batching="padded")
            assert update.footprint is not None  # because `measure` is true
            self._token_bytes[samples] = update.footprint.activation_bytes / longest
        return math.ceil(self._token_bytes[samples] * longest)

    def _fastest(self, jobs: Sequence[Job]) -> int:
        """Return the size, at most `len(jobs)`, with the least time per client and step; report it to `on_event`."""
        brief = [job._replace(steps=min(job.steps, TRIAL_STEPS)) for job in jobs]
        tried: dict[int, float] = {}
        self._fits(brief[:1])  # warm-up, because the first call is slower
        for size in sorted({min(size, len(brief)) for size in SIZES}):
            seconds: list[float] = []
            while len(seconds) < TRIALS and math.inf not in seconds:
                seconds.append(self._seconds(brief[:size]))
            if math.inf in seconds:
                break
            tried[size] = min(seconds) / sum(job.steps for job in brief[:size])
            if min(list(tried.values())[-2:]) > ENOUGH * min(tried.values()):
                break
        if not tried:
            raise self._too_large(brief[:1])
        best = min(tried, key=lambda size: tried[size])
        others = ", ".join(f"{size}: {1e3 * took:.2f}" for size, took in tried.items())
        self._on_event(f"cohorts of {best} clients measure fastest here (ms a client's step: {others})")
        return best

    def _seconds(self, jobs: Sequence[Job]) -> float:
        """Return the time of training a cohort, or infinity if memory runs out."""
        device = self._shared.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        fits = self._fits(jobs)
        return time.perf_counter() - began if fits else math.inf

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Train a cohort, drop its updates, and return whether memory sufficed for it."""
        try:
            # This waits for the device, because it reads the losses at the end.
            train_together(self._shared, jobs, self._config.train)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def _modules(job: Job) -> int:
    return max(A.shape[0] for A, _ in job.start.factors.values())


def _fitting(needs: Sequence[int], room: float) -> int:
    """Return how many of the clients, taken in order, fit into one cohort of `room` bytes."""
    return sum(total <= room for total in itertools.accumulate(needs))
