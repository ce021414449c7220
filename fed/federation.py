"""A run's rounds: clients start, train and send; the server aggregates; what that cost and did is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fed import methods
from fed.cohorts import Cohorts
from fed.cost import download_bytes, stack_bytes, upload_bytes
from fed.data import FederatedData
from fed.evaluate import evaluate, evaluate_held_out
from fed.footprint import peak_bytes, restart_peak
from fed.local import Job, Workplace, fault, module_gradients, started, train
from fed.noise import agg_noise, agg_noise_module, end_factors, factor_noise, start_noise
from fed.personal import accuracy_for, labels_of
from fed.population import drawn, learning_rate, local_steps, populate
from fed.server import step
from fed.store import ClientStore, Kept
from fed.streams import Source
from fed.types import Adapter, Client, ClientStart, ClientUpdate, Factors, Options, ServerState

if TYPE_CHECKING:
    from fed.config import RunConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """All a run goes on from: the server, its clients by id, and the factors each ended its last round with.

    The last are kept for measuring alone, and not where noise is not measured.
    """

    server: ServerState
    clients: tuple[Client, ...]
    ends: Mapping[int, Mapping[str, Factors]] = field(default_factory=dict)


@dataclass(frozen=True)
class Visit:
    """One client's turn in a round: `fault` says why its update cannot be used, or is None."""

    client: Client
    start: ClientStart
    update: ClientUpdate
    start_noise: float | None
    factor_noise: tuple[float, float] | None
    fold_seconds: float
    train_seconds: float
    fault: str | None


@dataclass(frozen=True)
class Round:
    """A round that is over: its row, where the run stands after it, and the updates that were used."""

    row: Row
    standing: Standing
    updates: Sequence[ClientUpdate] = ()


@dataclass(frozen=True)
class Federation:
    """A run's configuration, its data, and the model its clients take turns on.

    What clients keep between rounds goes to the `store`; without one it stays in memory.
    """

    config: RunConfig
    data: FederatedData
    work: Workplace
    on_event: Callable[[str], object]
    store: ClientStore | None = None
    cohort_size: int | None = None  # what an earlier part of the run measured as fastest

    @cached_property
    def cohorts(self) -> Cohorts:
        """How clients are trained together."""
        return Cohorts(self.work, self.config, self.on_event, self.cohort_size)

    @property
    def method(self) -> methods.Method:
        """The run's method."""
        return methods.find(self.config.method)

    def beginning(self) -> Standing:
        """Return where the run stands before its first round; FedError where the method cannot serve it."""
        if self.method.folds:
            self.work.base.check_foldable(self.config.method)
        server = first_state(self.work, self.config)
        clients = populate(self.config, self.data, self.work, self.method)
        if self.config.train.head == "personal":
            clients = tuple(replace(client, head=server.head) for client in clients)
        return Standing(server, clients)

    def play(self, standing: Standing) -> Iterator[Round]:
        """Yield row 0, if this is the beginning, and every round that is still to come.

        When the last is over the model is at the server's last state.
        """
        if standing.server.round == 0:
            yield Round(self.row(standing, standing, [], None, None), standing)
        while standing.server.round < self.config.rounds:
            following = self.round(standing)
            yield following
            standing = following.standing
        self.work.load_server(standing.server)

    def round(self, before: Standing) -> Round:
        """Play one round."""
        restart_peak(self.work.device)
        visits = self.visits(before, drawn(self.config, before.clients, before.server.round + 1))
        usable = [visit for visit in visits if visit.fault is None]
        updates = [visit.update for visit in usable]
        server = self.aggregate(before.server, visits)
        noise, module_noise = self.aggregation_noise(server, usable)
        after = self.settle(before, server, visits)
        return Round(self.row(before, after, visits, noise, module_noise), after, updates)

    def visits(self, standing: Standing, clients: Sequence[Client]) -> list[Visit]:
        """Let every client start from the server's state and train, one after another or a cohort at a time."""
        number = standing.server.round + 1
        jobs = [self.job(standing, client, Source(self.config.seed, number, client.id)) for client in clients]
        if self.config.execution == "cohort":
            return self.together(standing, jobs)
        return [self.alone(standing, job) for job in jobs]

    def job(self, standing: Standing, client: Client, rng: Source) -> Job:
        """Return what a client has to do in a round; a cohort holds unselected modules frozen."""
        server, split = standing.server, self.data.clients[client.id]
        if self.method.selects and self.config.adapter.selection == "gradient":
            gradients = module_gradients(self.work, server, split, self.config.train.batch_size, rng)
            client = replace(client, gradients=gradients)
        start = self.method.start(server, client, rng)
        if self.config.execution == "cohort":
            start = replace(start, unselected="frozen")
        steps, rate = local_steps(self.config, client), learning_rate(self.config, client)
        return Job(client, start, client.head or server.head, split, steps, rate, rng)

    def alone(self, standing: Standing, job: Job) -> Visit:
        """Let one client train by itself."""
        began = self.now()
        with started(self.work, job.start, job.head, standing.server.base_delta):
            ready = self.now()
            noise = self.noise_of(standing, job)
            before_training = self.now()
            update = train(self.work, job, self.config.train, self.config.measure.memory)
            trained = self.now()
        fold_seconds = ready - began + self.now() - trained
        return self.visit(standing, job, update, noise, fold_seconds, trained - before_training)

    def together(self, standing: Standing, jobs: Sequence[Job]) -> list[Visit]:
        """Let clients train in cohorts, on one base; each is booked an equal share of the time."""
        began = self.now()
        self.work.base.hold(standing.server.base_delta)
        ready = self.now()
        noises = [self.noise_of(standing, job) for job in jobs]
        before_training = self.now()
        updates = self.cohorts.train(jobs)
        fold_seconds, train_seconds = (ready - began) / len(jobs), (self.now() - before_training) / len(jobs)
        return [
            self.visit(standing, job, update, noise, fold_seconds, train_seconds)
            for job, update, noise in zip(jobs, updates, noises, strict=True)
        ]

    def noise_of(self, standing: Standing, job: Job) -> float | None:
        """Return how far a client's start is from the server, as the base now holds it; None if not measured."""
        if not self.config.measure.noise:
            return None
        return start_noise(standing.server, job.start, self.work.base.changed())

    def visit(
        self,
        standing: Standing,
        job: Job,
        update: ClientUpdate,
        noise: float | None,
        fold_seconds: float,
        train_seconds: float,
    ) -> Visit:
        """Return one client's turn, its method's last word said."""
        update, number = self.method.finish(standing.server, job.start, update), job.client.id
        moved = factor_noise(job.start.factors, standing.ends[number]) if number in standing.ends else None
        return Visit(job.client, job.start, update, noise, moved, fold_seconds, train_seconds, fault(update))

    def aggregate(self, server: ServerState, visits: Sequence[Visit]) -> ServerState:
        """Return the next server state from the updates that can be used; without any it keeps what it has."""
        number = server.round + 1
        for visit in visits:
            if visit.fault is not None:
                self.on_event(f"round {number}: client {visit.client.id} is left out: {visit.fault}")
        updates = [visit.update for visit in visits if visit.fault is None]
        if not updates:
            self.on_event(f"round {number}: no client sent a usable update; the server keeps its state")
            return replace(server, round=number, fold={}, fold_bytes=(*server.fold_bytes, 0))
        following = step(server, self.method.aggregate(server, updates), self.config.server)
        return replace(following, fold_bytes=(*server.fold_bytes, stack_bytes(following.fold)))

    def aggregation_noise(self, server: ServerState, usable: Sequence[Visit]) -> tuple[float | None, float | None]:
        """Return agg_noise and agg_noise_module, None where they are not measured or have no meaning."""
        if not usable or not self.config.measure.noise:
            return None, None
        updates = [visit.update for visit in usable]
        by_module = agg_noise_module(server, updates) if self.method.by_module else None
        return agg_noise(server, [visit.start for visit in usable], updates), by_module

    def settle(self, before: Standing, server: ServerState, visits: Sequence[Visit]) -> Standing:
        """Return where the run stands after a round: clients remember what they keep, and that they took part."""
        clients, ends = list(before.clients), dict(before.ends)
        for visit in visits:
            client = before.clients[visit.client.id]
            if visit.fault is None:
                kept = self.kept(visit, server.round)
                client = replace(client, memory=kept.memory, head=kept.head)
                if kept.ends:
                    ends[client.id] = kept.ends
            clients[client.id] = replace(client, last_round=server.round)
        return Standing(server, tuple(clients), ends)

    def kept(self, visit: Visit, number: int) -> Kept:
        """Return what a client keeps of its turn in round `number`, from the store where there is one."""
        update, ends = visit.update, {}
        head = update.head if self.config.train.head == "personal" else {}
        if self.config.measure.noise:
            ends = {matrix: end_factors(visit.start, update, matrix) for matrix in update.factors}
        kept = Kept(update.memory, head, ends)
        return kept if self.store is None else self.store.keep(visit.client.id, number, kept)

    def row(
        self,
        before: Standing,
        after: Standing,
        visits: Sequence[Visit],
        noise: float | None,
        module_noise: float | None,
    ) -> Row:
        """Return a round's row: bytes up over the updates that were used, bytes down over all its clients."""
        server = after.server
        self.work.load_server(server)
        right = torch.zeros(len(self.data.test), dtype=torch.bool, device=self.work.device)
        metrics = finite(evaluate_held_out(self.work.model, self.data, right))
        usable = [visit for visit in visits if visit.fault is None]
        head_travels = self.config.train.head == "train"
        head = before.server.head if head_travels else {}
        accuracies = self.client_accuracies(after, visits, right) if self.config.measure.clients and visits else None
        return {
            "round": server.round,
            **metrics,
            "init_noise": _mean(visit.start_noise for visit in visits),
            "agg_noise": noise,
            "agg_noise_module": module_noise,
            **_factor_noises(visits),
            "upload_bytes": sum(upload_bytes(visit.start, visit.update, head_travels) for visit in usable),
            "download_bytes": sum(download_bytes(visit.start, head, before.server, visit.client) for visit in visits),
            **_footprint(visits),
            "fold_seconds": sum(visit.fold_seconds for visit in visits),
            "train_seconds": sum(visit.train_seconds for visit in visits),
            "peak_memory_bytes": peak_bytes(self.work.device) if self.config.measure.memory else None,
            "cohort_size": self.cohorts.size if visits and self.config.execution == "cohort" else None,
            "client_accuracy": accuracies,
            "worst_accuracy": min(accuracies) if accuracies else None,
            "clients": [visit.client.id for visit in visits],
            "steps": [visit.update.steps for visit in visits],
            "skipped": [visit.client.id for visit in visits if visit.fault is not None],
        }

    def client_accuracies(self, standing: Standing, visits: Sequence[Visit], right: Tensor) -> list[float] | None:
        """Return the accuracy of each client of the round, with its own model where models are personal.

        `right` (n,) says which test rows the global model classifies rightly. None where nothing tells one client's
        accuracy from another's: one model for all, and no labels.
        """
        personal = self.method.personal or self.config.train.head == "personal"
        wanted = labels_of(self.data.test)
        if wanted is None and not personal:
            return None
        accuracies = []
        for client in (standing.clients[visit.client.id] for visit in visits):
            own = labels_of(self.data.clients[client.id])
            if personal:
                self.load_personal(standing, client)
                accuracy = evaluate(self.work.model, self.data.test, right)["accuracy"]
            if wanted is not None and own is not None:
                accuracy = accuracy_for(own, right.cpu(), wanted)
            accuracies.append(accuracy)
        return accuracies

    def load_personal(self, standing: Standing, client: Client) -> None:
        """Put the model where a client's own is: the server's, with what the client kept in its place."""
        server = standing.server
        self.work.load_server(server)
        factors, scale = self.work.handle.factors(), server.adapter.scale
        if self.method.personal:
            own = self.method.start(server, client, Source(self.config.seed, server.round + 1, client.id))
            factors, scale = dict(own.factors), own.scale
        self.work.load(factors, client.head or server.head, scale)

    def now(self) -> float:
        """Return the time in seconds, once the device has done all it was given."""
        if self.work.device.type == "cuda":
            torch.cuda.synchronize(self.work.device)
        return time.perf_counter()


def first_state(work: Workplace, config: RunConfig) -> ServerState:
    """Return the server before the first round: the adapter just drawn (B = 0) and the head as it stands."""
    scale = next(iter(work.handle.layers.values())).scale
    adapter, hetlora = config.adapter, config.hetlora
    head = {name: parameter.detach().clone() for name, parameter in work.head.items()}
    options = Options(adapter.selection, hetlora.weighting, hetlora.prune, hetlora.decay, hetlora.penalty)
    factors = Adapter(work.handle.factors(), scale, adapter.unselected, work.rank, adapter.rank_stabilized)
    return ServerState(factors, head, options=options)


def _factor_noises(visits: Sequence[Visit]) -> Row:
    """Return the means over clients seen before: of both factors together, in squares, and of each."""
    pairs = [visit.factor_noise for visit in visits if visit.factor_noise is not None]
    return {
        "factor_noise": _mean(math.hypot(*pair) for pair in pairs),
        "factor_noise_A": _mean(pair[0] for pair in pairs),
        "factor_noise_B": _mean(pair[1] for pair in pairs),
    }


def _footprint(visits: Sequence[Visit]) -> Row:
    """Return the mean of the clients' trained numbers, and of each kind of memory what the neediest of them took."""
    taken = [visit.update.footprint for visit in visits if visit.update.footprint is not None]
    return {
        "trainable_parameters": _mean(float(of_one.trainable_parameters) for of_one in taken),
        "optimizer_bytes": max((of_one.optimizer_bytes for of_one in taken), default=None),
        "activation_bytes": max((of_one.activation_bytes for of_one in taken), default=None),
    }


def finite(metrics: Mapping[str, float]) -> Row:
    """Return the metrics, those that are not finite as None."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
