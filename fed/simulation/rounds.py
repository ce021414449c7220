"""A run's rounds: clients start, train and send; the server aggregates; what that cost and did is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from fed import methods
from fed.data.federated_data import FederatedData
from fed.models.shared_model import Workplace, started
from fed.seeding import Source
from fed.simulation.client_store import ClientStore, Kept
from fed.simulation.clients import drawn, learning_rate, local_steps, populate
from fed.simulation.communication import stack_bytes
from fed.simulation.noise import end_factors, factor_noise
from fed.simulation.round_metrics import RoundMetrics
from fed.simulation.server_optimizer import step
from fed.training.cohort_scheduler import Cohorts
from fed.training.local import Job, fault, module_gradients, train
from fed.training.memory import restart_peak
from fed.types import (
    Adapter,
    Client,
    ClientUpdate,
    Options,
    Round,
    ServerState,
    Standing,
    Visit,
)

if TYPE_CHECKING:
    from fed.config import RunConfig


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

    @cached_property
    def metrics(self) -> RoundMetrics:
        """What a round's row holds."""
        return RoundMetrics(self.config, self.data, self.work, self.method)

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
            yield Round(self.metrics.row(standing, standing, []), standing)
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
        noise, module_noise = self.metrics.aggregation_noise(server, usable)
        after = self.settle(before, server, visits)
        size = self.cohorts.size if self.config.execution == "cohort" else None
        row = self.metrics.row(before, after, visits, noise, module_noise, size)
        return Round(row, after, updates)

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
            noise = self.metrics.start_noise(standing, job)
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
        noises = [self.metrics.start_noise(standing, job) for job in jobs]
        before_training = self.now()
        updates = self.cohorts.train(jobs)
        fold_seconds, train_seconds = (ready - began) / len(jobs), (self.now() - before_training) / len(jobs)
        return [
            self.visit(standing, job, update, noise, fold_seconds, train_seconds)
            for job, update, noise in zip(jobs, updates, noises, strict=True)
        ]

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
