"""The rounds of a run: clients start, train and send their updates; the server aggregates; the round is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from fed import methods
from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.data.tables import Split
from fed.errors import FedError, StoppedError
from fed.models.shared_model import SharedModel, started
from fed.seeding import ClientRandom
from fed.simulation.aggregation import Aggregated, Candidate, aggregate_usable, enough, told
from fed.simulation.attacks import attacked, attackers, training_splits
from fed.simulation.client_store import ClientState, ClientStore
from fed.simulation.clients import drawn, learning_rate, local_steps, populate
from fed.simulation.clipping import clip_usable
from fed.simulation.communication import stack_bytes
from fed.simulation.evaluation import WorkProgress
from fed.simulation.noise import end_factors, factor_noise
from fed.simulation.privacy import PrivateServer
from fed.simulation.replays import fingerprint, remembered, replay_fault, version
from fed.simulation.round_metrics import Evaluation, RoundMetrics
from fed.simulation.server_optimizer import step
from fed.simulation.update_checks import Asked, asked_of, find_fault, growth, hint_of_overflow, state_fault
from fed.training.batching import find_way
from fed.training.cohort import check_cohorts
from fed.training.cohort_scheduler import CohortScheduler
from fed.training.local import Job, module_gradients, train
from fed.training.memory import is_out_of_memory, restart_peak
from fed.types import Adapter, Client, ClientResult, ClientUpdate, Options, Round, RunState, Sent, ServerState

# An update's growth and a loss in nats from which on a new state is checked further. They are far above those of a
# healthy run, which the further checks thus cost nothing.
LARGE_GROWTH, LARGE_LOSS = 100.0, 100.0


class Executor(Protocol):
    """The training of a run's clients on other machines; `Federation` does everything else of a round."""

    def clients(self, federation: Federation) -> tuple[Client, ...] | None:
        """Return all clients as they are before the first round; None if the configuration says which there are."""

    def train(self, federation: Federation, state: RunState, clients: Sequence[Client]) -> list[ClientResult]:
        """Train the clients in the round after `state`; return the checked results of those that answered in time.

        The results come in the order of the clients.
        """


@dataclass(frozen=True)
class Federation:
    """A run's configuration, its data, and the one model that all its clients train on.

    What clients keep between rounds goes to the `store`, or stays in memory if there is none. `on_event` receives
    messages about the run, `on_progress` how far the generation of answers is. With an `executor` the clients train
    elsewhere, on the same `inputs`, of which these are the digests.
    """

    config: RunConfig
    data: FederatedData
    shared: SharedModel
    on_event: Callable[[str], object]
    store: ClientStore | None = None
    clients_per_pass: int | None = None  # the fastest number of clients, if measured before the run was interrupted
    on_progress: WorkProgress | None = None
    executor: Executor | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def cohorts(self) -> CohortScheduler:
        """The scheduler that trains clients in cohorts."""
        return CohortScheduler(self.shared, self.config, self.on_event, self.clients_per_pass)

    @cached_property
    def metrics(self) -> RoundMetrics:
        """The measurements that go into a round's row."""
        return RoundMetrics(self.config, self.data, self.shared, self.method, self.on_progress)

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        """The rows that each client trains on."""
        return training_splits(self.config, self.data)

    @cached_property
    def private(self) -> PrivateServer | None:
        """The private aggregation, if there is to be any."""
        if not self.config.privacy.clip:
            return None
        return PrivateServer.of(self.config, self.population)

    @cached_property
    def population(self) -> tuple[Client, ...]:
        """All clients before the first round, as the configuration says, or the machines that are clients.

        Raises FedError for a deployment without its machines: their ranks, rows and memories are there alone.
        """
        if self.executor is None and self.config.engine.mode == "deployment":
            raise FedError(
                "engine.mode is 'deployment', and the run would be played on this machine alone; --flower ADDRESS or "
                "engine.mode = 'simulation' would be right"
            )
        clients = None if self.executor is None else self.executor.clients(self)
        return populate(self.config, self.data, self.shared, self.method) if clients is None else clients

    @property
    def method(self) -> methods.Method:
        """The aggregation method of the run."""
        return methods.find(self.config.method)

    def beginning(self) -> RunState:
        """Return the state of the run before its first round; raise FedError if its method cannot run with it."""
        if self.method.folds:
            self.shared.base.check_foldable(self.config.method)
        find_way(self.config.train, self.shared.model, self.data.test.table)  # refused before anything is trained
        if self.config.execution == "cohort":
            check_cohorts(self.shared)
        server = first_state(self.shared, self.config)
        clients = self.population
        _ = self.private  # refused before anything is trained
        if self.config.train.head == "personal":
            clients = tuple(replace(client, head=server.head) for client in clients)
        return RunState(server, clients)

    def measure_cohort_size(self, state: RunState) -> int:
        """Return the number of clients in a cohort: the configured one, or the fastest for clients of the next round.

        Measuring takes a few training steps and reports the times to `on_event`. It changes neither the state nor the
        model nor any random numbers. Raises FedError if not even one client fits into memory.
        """
        if self.cohorts.size is None:
            self.shared.base.apply_delta(state.server.base_delta)
            return self.cohorts.measure(self.jobs(state, drawn(self.config, state.clients, state.server.round + 1)))
        return self.cohorts.size

    def play(self, state: RunState, begun: bool = False) -> Iterator[Round]:
        """Play the remaining rounds and yield each of them, after round 0 unless the run has `begun` with it already.

        Round 0 only evaluates the unadapted model. After the last round the server's final state is loaded into the
        model.
        """
        if not begun:
            yield Round(self.metrics.row(state, state, []), state)
        while state.server.round < self.config.rounds:
            following = self.round(state)
            yield following
            state = following.state
        self.shared.load_server(state.server)

    def round(self, before: RunState) -> Round:
        """Play the round after the state `before`: draw and train clients, aggregate their updates and measure.

        Raises FedError if the server kept its state in the last `server.patience` rounds.
        """
        self.check_patience(before.server)
        restart_peak(self.shared.device)
        trained, late = self.train_clients(before, drawn(self.config, before.clients, before.server.round + 1))
        chosen, results = self.aggregate(before, trained)
        server = idle(before.server) if chosen is None else chosen.server
        usable = [result for result in results if result.fault is None]
        noise, module_noise = self.metrics.aggregation_noise(server, usable)
        after = self.update_clients(before, server, results)
        evaluation = None if chosen is None else chosen.evaluation
        spent = None if self.private is None else self.private.spent(server.round)
        size = self.cohort_size
        row = self.metrics.row(before, after, results, noise, module_noise, size, evaluation, late, spent)
        return Round(row, after, [result.update for result in usable])

    def check_patience(self, server: ServerState) -> None:
        """Raise FedError if too few updates were usable in as many rounds in a row as `server.patience` allows."""
        patience, least = self.config.server.patience, self.config.server.min_updates
        if patience and server.idle_rounds >= patience:
            few = "no client" if least == 1 else f"fewer clients than server.min_updates ({least})"
            raise StoppedError(
                f"{few} sent a usable update in {server.idle_rounds} rounds in a row, up to round {server.round}: "
                f"server.patience is {patience}; a new run with a smaller train.learning_rate or other data would be "
                "right, or server.patience = 0 in the run's config.toml to go on regardless"
            )

    @property
    def cohort_size(self) -> int | None:
        """The number of clients in a cohort; None if clients train one after another, or machines choose it."""
        if self.config.execution != "cohort":
            return None
        return self.cohorts.size if self.executor is None else self.config.clients_per_pass or None

    def train_clients(self, state: RunState, clients: Sequence[Client]) -> tuple[list[ClientResult], list[int]]:
        """Train the participating clients; return the results, and the ids of clients that gave none in time."""
        if self.executor is None:
            return self.train_here(state, clients), []
        results = self.executor.train(self, state, clients)
        answered = {result.client.id for result in results}
        return results, [client.id for client in clients if client.id not in answered]

    def train_here(self, state: RunState, clients: Sequence[Client]) -> list[ClientResult]:
        """Train clients from the server's state in this process, one after another or a cohort at a time."""
        jobs = self.jobs(state, clients)
        if self.config.execution == "cohort":
            return self.train_cohorts(state, jobs)
        return [self.train_alone(state, job) for job in jobs]

    def jobs(self, state: RunState, clients: Sequence[Client]) -> list[Job]:
        """Return the clients' local training in the round after `state`."""
        number = state.server.round + 1
        return [self.job(state, client, ClientRandom(self.config.seed, number, client.id)) for client in clients]

    def train_alone(self, state: RunState, job: Job) -> ClientResult:
        """Train one client by itself; raise FedError if there is not enough memory for it."""
        try:
            return self.train_sequentially(state, job)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        raise FedError(
            f"round {job.rng.round}: client {job.client.id} runs out of memory in training; a smaller train.batch_size "
            "or train.gradient_checkpointing = true would be right"
        )

    def job(self, state: RunState, client: Client, rng: ClientRandom) -> Job:
        """Return a client's local training in this round; a client that has gradients keeps them.

        In a cohort unselected modules are held frozen: clients with different modules cannot fold them into one base.
        """
        server, split = state.server, self.splits[client.id]
        if self.method.selects and self.config.adapter.selection == "gradient" and not client.gradients:
            gradients = module_gradients(self.shared, server, split, self.config.train.batch_size, rng)
            client = replace(client, gradients=gradients)
        start = self.method.start(server, client, rng)
        if self.config.execution == "cohort":
            start = replace(start, unselected="frozen")
        steps, rate = local_steps(self.config, client), learning_rate(self.config, client)
        return Job(client, start, client.head or server.head, split, steps, rate, rng)

    def train_sequentially(self, state: RunState, job: Job) -> ClientResult:
        """Train one client by itself and return its result."""
        began = self.now()
        with started(self.shared, job.start, job.head, state.server.base_delta):
            ready = self.now()
            noise = self.metrics.start_noise(state, job)
            before_training = self.now()
            update = train(self.shared, job, self.config.train, self.config.measure.memory)
            trained = self.now()
        fold_seconds = ready - began + self.now() - trained
        return self.client_result(state, job, update, noise, fold_seconds, trained - before_training)

    def train_cohorts(self, state: RunState, jobs: Sequence[Job]) -> list[ClientResult]:
        """Train clients in cohorts on one base and return their results; each gets an equal share of the time."""
        began = self.now()
        self.shared.base.apply_delta(state.server.base_delta)
        ready = self.now()
        noises = [self.metrics.start_noise(state, job) for job in jobs]
        before_training = self.now()
        updates = self.cohorts.train(jobs)
        fold_seconds, train_seconds = (ready - began) / len(jobs), (self.now() - before_training) / len(jobs)
        return [
            self.client_result(state, job, update, noise, fold_seconds, train_seconds)
            for job, update, noise in zip(jobs, updates, noises, strict=True)
        ]

    def client_result(
        self,
        state: RunState,
        job: Job,
        update: ClientUpdate,
        noise: float | None,
        fold_seconds: float,
        train_seconds: float,
    ) -> ClientResult:
        """Return the result of one client's training, after the method has decided what it sends and what it keeps."""
        update = replace(self.method.finish(state.server, job.start, update), client=job.client)
        if job.client.id in attackers(self.config):
            update = attacked(self.config.attack, job, update)
        ends = state.ends.get(job.client.id)
        moved = None if ends is None else factor_noise(job.start.factors, ends)
        return self.checked(state, job, update, noise, moved, fold_seconds, train_seconds)

    def checked(
        self,
        state: RunState,
        job: Job,
        update: ClientUpdate,
        noise: float | None,
        moved: tuple[float, float] | None,
        fold_seconds: float,
        train_seconds: float,
        asked: Asked | None = None,
    ) -> ClientResult:
        """Return a client's result with what makes its update unusable, if anything does.

        `moved` is the factor noise; `asked` is what the update must say, if its job does not tell.
        """
        footprint = update.footprint
        fault, sent = find_fault(state.server, job.start, update, asked or asked_of(job, self.config.train)), None
        if fault is None:
            sent = Sent(version(state.server), fingerprint(job.start, update))
            fault = replay_fault(state, job.start, job.head, update, sent)
        elif dtypes := {own.dtype for own in self.shared.model.parameters()}:
            fault += hint_of_overflow(update, dtypes)
        seconds = fold_seconds, train_seconds
        return ClientResult(job.client, job.start, update, job.steps, footprint, noise, moved, *seconds, fault, sent)

    def aggregate(self, before: RunState, trained: Sequence[ClientResult]) -> Aggregated:
        """Aggregate the usable updates if there are enough; say which are left out, and why, and which are clipped."""
        number, server = before.server.round + 1, before.server
        if self.private is not None:  # no update may decide on another's
            for result in trained:
                if result.fault is not None:
                    self.on_event(f"round {number}: client {result.client.id} is left out: {result.fault}")
            following = step(server, self.private.aggregate(server, trained), self.config.server)
            following = replace(following, fold_bytes=(*server.fold_bytes, 0), idle_rounds=0)
            return Aggregated(Candidate(following, None, None), list(trained))
        trained = enough(trained, self.config.server.min_updates)
        head = server.head if self.config.train.head == "train" else {}  # a personal head is not sent
        taken = clip_usable(trained, head, self.config.server.max_update_norm)
        grown = {
            result.client.id: growth(result.start, result.client.head or server.head, result.update)
            for result in trained
            if result.fault is None
        }
        aggregated = aggregate_usable(
            trained,
            lambda result: grown[result.client.id],
            lambda results: self.attempt(before, [taken.get(result.client.id, result) for result in results], grown),
        )
        results = enough(aggregated.results, self.config.server.min_updates)
        results = [replace(result, clipped=result.client.id in taken) for result in results]
        for line in told(results, self.config.server.max_update_norm):
            self.on_event(f"round {number}: {line}")
        return Aggregated(None if all(result.fault for result in results) else aggregated.chosen, results)

    def attempt(self, before: RunState, results: Sequence[ClientResult], grown: Mapping[int, float]) -> Candidate:
        """Return the server's state after aggregating these results, and whether it is usable.

        With a usable state everything is finite, the model's metrics too where they were before; no update grew very
        much more than another of the round; and, if the loss or an update's growth is large, a client can train on
        from the state. `grown` is every usable update's growth by client.
        """
        server, updates = before.server, [result.update for result in results]
        try:
            following = step(server, self.method.aggregate(server, updates), self.config.server)
        except torch.linalg.LinAlgError as error:
            return Candidate(server, None, f"with it the server's update has no decomposition ({error})")
        sizes = (*server.fold_bytes, stack_bytes(following.fold))
        following = replace(following, fold_bytes=sizes, idle_rounds=0)
        if fault := state_fault(following):
            return Candidate(following, None, f"with it {fault}")
        calmest = min(grown, key=lambda client: grown[client])
        largest = max(grown[result.client.id] for result in results)
        # Of a client that sends next to nothing all others would seem to grow, so it is compared with 1, no growth.
        if math.isfinite(grown[calmest]) and largest >= LARGE_GROWTH * max(grown[calmest], 1.0):
            # The loss would not show it: behind a norm layer and a frozen head it is about that of chance.
            return Candidate(following, None, f"it grew {largest:.3g}-fold, client {calmest} {grown[calmest]:.3g}-fold")
        evaluation = self.metrics.evaluate(following)
        fault, loss = self.evaluation_fault(server, evaluation), evaluation.metrics["loss"]
        if fault is None and (loss > LARGE_LOSS or largest >= LARGE_GROWTH):
            fault = self.training_fault(before, following, calmest)
        return Candidate(following, evaluation, fault and f"with it {fault}")

    def evaluation_fault(self, server: ServerState, evaluation: Evaluation) -> str | None:
        """Return what of the state that was just evaluated is not finite but was with `server`, or None."""
        for matrix, (weight, original) in self.shared.base.changed().items() if self.method.folds else ():
            if not (weight.isfinite() | ~original.isfinite()).all():
                return f"the weight of {matrix} would hold NaN or infinity"
        if lost := evaluation.not_finite():
            lost -= self.metrics.evaluate(server).not_finite()
        return f"the model's {min(lost)} would be {evaluation.metrics[min(lost)]}" if lost else None

    def training_fault(self, before: RunState, following: ServerState, client: int) -> str | None:
        """Return why a client cannot repeat its training of this round from the state `following`, or None."""
        # The round stays the same, so that the client's data and random numbers do, with which it trained before.
        server = replace(following, round=before.server.round)
        results, _ = self.train_clients(replace(before, server=server), [before.clients[client]])
        if not results:
            return f"client {client} did not answer whether it could train on"
        return results[0].fault and f"client {client} could not train on: {results[0].fault}"

    def update_clients(self, before: RunState, server: ServerState, results: Sequence[ClientResult]) -> RunState:
        """Return the state of the run after a round: the new server, and what participating clients keep."""
        clients, ends, sent = list(before.clients), dict(before.ends), dict(before.sent)
        for result in results:
            client = before.clients[result.client.id]
            if result.fault is None:
                kept = self.kept(result, server.round)
                client = replace(client, memory=kept.memory, head=kept.head, kept_round=server.round)
                if kept.ends:
                    ends[client.id] = kept.ends
                if result.sent is not None:
                    sent[client.id] = remembered(sent.get(client.id, ()), result.sent)
            clients[client.id] = replace(client, last_round=server.round)
        return RunState(server, tuple(clients), ends, sent)

    def kept(self, result: ClientResult, number: int) -> ClientState:
        """Return what a client keeps after round `number`; if there is a store, it is written there and read lazily."""
        kept = self.state_to_keep(result)
        return kept if self.store is None else self.store.keep(result.client.id, number, kept)

    def state_to_keep(self, result: ClientResult) -> ClientState:
        """Return what a client keeps of a round: its method's memory, its own head, and, for noise, how it ended."""
        update, ends = result.update, {}
        head = update.head if self.config.train.head == "personal" else {}
        if self.config.measure.noise:
            ends = {matrix: end_factors(result.start, update, matrix) for matrix in update.factors}
        return ClientState(update.memory, head, ends)

    def now(self) -> float:
        """Return the time in seconds, after waiting for all work queued on the device."""
        if self.shared.device.type == "cuda":
            torch.cuda.synchronize(self.shared.device)
        return time.perf_counter()


def idle(server: ServerState) -> ServerState:
    """Return the server's state after a round without a usable update: the same adapter, head and base."""
    return replace(
        server,
        round=server.round + 1,
        fold={},
        fold_bytes=(*server.fold_bytes, 0),
        idle_rounds=server.idle_rounds + 1,
    )


def first_state(shared: SharedModel, config: RunConfig) -> ServerState:
    """Return the server before the first round: the newly initialised adapter (B = 0) and the model's head."""
    scale = next(iter(shared.handle.layers.values())).scale
    adapter, hetlora, rule = config.adapter, config.hetlora, config.server
    head = {name: parameter.detach().clone() for name, parameter in shared.head.items()}
    options = Options(
        *(adapter.selection, hetlora.weighting, hetlora.prune, hetlora.decay, hetlora.penalty),
        *(rule.aggregation, rule.trim, rule.byzantine_share),
    )
    factors = Adapter(shared.handle.factors(), scale, adapter.unselected, shared.rank, adapter.rank_stabilized)
    return ServerState(factors, head, options=options)
