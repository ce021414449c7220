"""What the cost model says of a run, beside what the run counts and takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.harness.memory import peak_bytes
from bench.harness.operations import CountedOperations
from bench.scale.models import Prepared, Size, prepare
from fed.experiments.costs.compute import step_operations, trace
from fed.experiments.costs.memory import client_memory, cohort_bytes
from fed.experiments.costs.traffic import Messages, round_traffic
from fed.models.head import head_names
from fed.models.shared_model import SharedModel, adapted, started
from fed.models.weightless import weightless
from fed.simulation.rounds import Federation
from fed.training.cohort import train_together
from fed.training.local import Job, train
from fed.types import measured

METHODS = ("fed-plora", "flora", "flexlora", "rolora")
RANKS = ("clients.ranks=[2,4,8,16]",)
STEPS, CLIENTS = (1, 2, 4, 8), (1, 2, 4, 8)
COHORT = 4
REPEATS = 3


@dataclass(frozen=True)
class Compared:
    """One figure of the model beside the measured one. `what` is "bytes", "operations" or "memory"."""

    size: str
    what: str
    case: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Line:
    """Processor seconds by local steps or by clients, and the straight line through them: `fixed` + n · `each`."""

    size: str
    of: str
    counts: list[int]
    seconds: list[float]
    fixed_seconds: float
    each_seconds: float

    @property
    def largest_deviation(self) -> float:
        """The largest deviation of a measured time from the line, as a share of the time."""
        fitted = (self.fixed_seconds + count * self.each_seconds for count in self.counts)
        return max(abs(own - line) / own for own, line in zip(self.seconds, fitted, strict=True))


def check(size: Size, timed: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Return the comparisons of a size as `Compared`, and if `timed` its lines as `Line`, all as dictionaries."""
    with TemporaryDirectory() as folder:
        compared = [*compare_bytes(size, Path(folder)), *compare_training(size, Path(folder))]
        lines = time_lines(size, Path(folder)) if timed else []
    return {"compared": [asdict(one) for one in compared], "lines": [asdict(one) for one in lines]}


def compare_bytes(size: Size, folder: Path) -> list[Compared]:
    """Play rounds of some methods, and compare the bytes that they count with the predicted ones."""
    found = []
    for method in METHODS:
        ranks = ["clients.ranks=[16]"] if method == "rolora" else RANKS
        config, load, model, data = prepare(size, folder, [f"method={method}", *ranks])
        with weightless(config, load.labels) as outlined:
            predicted = round_traffic(Messages.of(config, outlined), config.clients.ranks, config.rounds)
        with adapted(config, model, head_names(model)) as shared:
            federation = Federation(config, data, shared, print)
            state, rows = federation.beginning(), []
            for _ in range(config.rounds):  # the unadapted model is not evaluated, which sends nothing
                played = federation.round(state)
                state = played.state
                rows.append(played.row)
        for way in ("upload", "download"):
            said = sum(getattr(one, f"{way}_bytes") for one in predicted)
            counted = sum(measured(row, f"{way}_bytes") for row in rows)
            found.append(Compared(size.name, "bytes", f"{method}, {way}, {config.rounds} rounds", said, counted))
    return found


def compare_training(size: Size, folder: Path) -> list[Compared]:
    """Compare the operations and the memory of a client's step, and the memory of a cohort's."""
    found = []
    for unselected in ("folded", "frozen"):
        prepared = prepare(size, folder, [*RANKS, f"adapter.unselected={unselected}"])
        config, load, model, _ = prepared
        with weightless(config, load.labels) as outlined:
            traced, full = trace(outlined, load), config.adapter.rank
            said = {rank: client_memory(config, outlined, load, rank).training_bytes for rank in config.clients.ranks}
            together = cohort_bytes(config, outlined, load, COHORT).training_bytes
        with adapted(config, model, head_names(model)) as shared:
            jobs = _jobs(prepared, shared)
            for job in (jobs[0], jobs[len(config.clients.ranks) - 1]):
                rank = job.client.rank
                case = f"a step, rank {rank}, {unselected}"
                held = full if unselected == "frozen" else 0
                operations = step_operations(traced, load, load.width(config), rank, held).total
                with started(shared, job.start, job.head):
                    train(shared, job, config.train)  # what is looked up once is not part of a step
                    with CountedOperations() as counted:
                        train(shared, job, config.train)
                    peak = peak_bytes(functools.partial(train, shared, job, config.train), torch.device("cpu"))
                factors = 0 if unselected == "folded" else 1
                found.append(Compared(size.name, "operations", case, operations, counted.total))
                beside = _loaded_bytes(shared, rank, factors * full)
                found.append(Compared(size.name, "memory", case, said[rank] - beside, peak))
            if unselected == "frozen":
                run = functools.partial(train_together, shared, jobs[:COHORT], config.train)
                peak = peak_bytes(run, torch.device("cpu"))
                beside = _loaded_bytes(shared, 0, 0)
                case = f"a step of {COHORT} clients in a cohort"
                found.append(Compared(size.name, "memory", case, together - beside, peak))
    return found


def _loaded_bytes(shared: SharedModel, rank: int, held: int) -> int:
    """Return the bytes of the modules that are loaded before training, and so are not in its peak."""
    layers = shared.handle.layers.values()
    return sum((rank + held) * (own.in_features + own.out_features) * own.lora_A.element_size() for own in layers)


def _jobs(prepared: Prepared, shared: SharedModel) -> list[Job]:
    federation = Federation(prepared.config, prepared.data, shared, print)
    state = federation.beginning()
    return federation.jobs(state, list(state.clients))


def time_lines(size: Size, folder: Path) -> list[Line]:
    """Measure the processor seconds of one client by its steps, and of clients of one step each by their number."""
    prepared = prepare(size, folder, ["clients.ranks=[8]"])
    config, _, model, _ = prepared
    with adapted(config, model, head_names(model)) as shared:
        jobs = _jobs(prepared, shared)

        def play(clients: int, steps: int) -> None:
            for job in jobs[:clients]:
                with started(shared, job.start, job.head):
                    train(shared, job._replace(steps=steps), config.train)

        play(1, 1)
        by_steps = [_seconds(functools.partial(play, 1, steps)) for steps in STEPS]
        by_clients = [_seconds(functools.partial(play, clients, 1)) for clients in CLIENTS]
    return [_line(size, "steps", STEPS, by_steps), _line(size, "clients", CLIENTS, by_clients)]


def _seconds(run: Callable[[], object]) -> float:
    """Return the median of the process's own seconds, which other work on the machine disturbs least."""
    taken = []
    for _ in range(REPEATS):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return median(taken)


def _line(size: Size, of: str, counts: Sequence[int], seconds: Sequence[float]) -> Line:
    """Return the line with the least squares of relative deviations."""
    weights = 1 / np.asarray(seconds)
    columns = np.stack([np.ones(len(counts)), np.asarray(counts, dtype=float)], axis=1) * weights[:, None]
    (fixed, each), *_ = np.linalg.lstsq(columns, np.ones(len(counts)), rcond=None)
    return Line(size.name, of, [*counts], [*seconds], float(fixed), float(each))
