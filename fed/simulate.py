"""The round loop: sample clients, start, train, aggregate, measure, save."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

import plora_kernels as pk
from fed import methods
from fed.cost import download_bytes, upload_bytes
from fed.data import FederatedData
from fed.evaluate import evaluate_held_out
from fed.local import Workplace, adapted, fault, held_updates, started, train
from fed.noise import agg_noise, start_noise
from fed.samples import Split
from fed.streams import Source, permutation
from fed.types import Adapter, Client, ClientStart, ClientUpdate, ServerState

if TYPE_CHECKING:
    from fed.config import RunConfig

Row = dict[str, Any]


def simulate(
    config: RunConfig,
    data: FederatedData,
    model: nn.Module,
    head_names: Sequence[str],
    directory: Path,
    on_round: Callable[[Row], object] | None = None,
    on_event: Callable[[str], object] | None = None,
) -> list[Row]:
    """Run `config.rounds` federated rounds and return their rows, row 0 being the unadapted model.

    Every row goes to `directory/rounds.jsonl` as soon as it is known, then to `on_round`; `on_event` gets a
    line for each client left out. At the end the adapter is saved to `directory/adapter` in PEFT's format,
    with the head where it was trained. The directory is made only once the adapter fits the model; the model
    comes back as it was.

    A row holds round, the metrics of `fed.evaluate.evaluate_held_out`, init_noise, agg_noise, upload_bytes,
    download_bytes, train_seconds, and the ids of the round's clients and of those skipped. A noise that
    nothing was there to measure is None, and so is a loss that is not finite.
    """
    with adapted(config, model, head_names) as work:
        federation = Federation(config, data.to(work.device), work, on_event or _discard)
        rows: list[Row] = []
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "rounds.jsonl").open("w", encoding="utf-8") as file:
            for row in federation.play():
                rows.append(row)
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                if on_round is not None:
                    on_round(row)
        pk.save_peft(work.handle, directory / "adapter", base_model_name_or_path=str(directory / "base"))
    return rows


def centralised(config: RunConfig, data: FederatedData, model: nn.Module, head_names: Sequence[str], steps: int) -> Row:
    """Train rank-R LoRA for `steps` batches of all clients' samples together, and return what it reaches.

    The adapter starts where the federated run's does; optimiser, learning rate and batch size are the run's.
    The result holds the metrics of `fed.evaluate.evaluate_held_out`, steps and train_seconds; the model comes
    back as it was.
    """
    with adapted(config, model, head_names) as work:
        data = data.to(work.device)
        pool = Split.joined(data.clients)
        client = Client(id=len(data.clients), rank=config.adapter.rank, n_samples=len(pool))
        rng = Source(config.seed, 0, client.id)
        server = first_state(work, config.adapter.unselected)
        start = methods.find("fedit").start(server, client, rng)
        began = time.perf_counter()
        with started(work, start, server.head):
            train(work, client, start, pool, config.train, steps, rng)
        train_seconds = time.perf_counter() - began
        metrics = evaluate_held_out(work.model, data)
    return _finite(metrics) | {"steps": steps, "train_seconds": train_seconds}


@dataclass(frozen=True)
class Visit:
    """One client's turn in a round: `fault` says why its update cannot be used, or is None."""

    start: ClientStart
    update: ClientUpdate
    start_noise: float
    train_seconds: float
    fault: str | None


@dataclass(frozen=True)
class Federation:
    """A run's configuration, its data, and the model its clients take turns on."""

    config: RunConfig
    data: FederatedData
    work: Workplace
    on_event: Callable[[str], object]

    def play(self) -> Iterator[Row]:
        """Yield row 0 and then every round's; the model is left at the server's last state."""
        server = first_state(self.work, self.config.adapter.unselected)
        yield self.row(server, [], None)
        while server.round < self.config.rounds:
            visits = [self.visit(server, client) for client in self.drawn(server.round + 1)]
            server, noise = self.aggregate(server, visits)
            yield self.row(server, visits, noise)

    def drawn(self, number: int) -> list[Client]:
        """Return the clients of round `number` by ascending id, drawn without replacement."""
        clients = self.config.clients
        order = permutation(len(self.data.clients), self.config.seed, number, "clients")
        return [
            Client(index, clients.ranks[index % len(clients.ranks)], len(self.data.clients[index]))
            for index in sorted(order[: clients.per_round].tolist())
        ]

    def visit(self, server: ServerState, client: Client) -> Visit:
        """Let one client start from the server's state and train; the base weights are as before after it."""
        rng = Source(self.config.seed, server.round + 1, client.id)
        start = methods.find(self.config.method).start(server, client, rng)
        split, settings = self.data.clients[client.id], self.config.train
        with started(self.work, start, server.head):
            noise = start_noise(server.adapter, held_updates(self.work, start))
            began = time.perf_counter()
            update = train(self.work, client, start, split, settings, settings.local_steps, rng)
            train_seconds = time.perf_counter() - began
        return Visit(start, update, noise, train_seconds, fault(update))

    def aggregate(self, server: ServerState, visits: Sequence[Visit]) -> tuple[ServerState, float | None]:
        """Return the next state and its aggregation noise, from what is usable; without, the same state."""
        number = server.round + 1
        for visit in visits:
            if visit.fault is not None:
                name = f"client {visit.update.client.id}"
                self.on_event(f"round {number}: {name} is left out: {visit.fault}")
        usable = [visit for visit in visits if visit.fault is None]
        if not usable:
            self.on_event(f"round {number}: no client sent a usable update; the server keeps its state")
            return replace(server, round=number), None
        updates = [visit.update for visit in usable]
        following = methods.find(self.config.method).aggregate(server, updates)
        return following, agg_noise(following.adapter, [visit.start for visit in usable], updates)

    def row(self, server: ServerState, visits: Sequence[Visit], noise: float | None) -> Row:
        """Return a round's row: bytes up over the updates that were used, bytes down over all its clients."""
        self.work.load(server.adapter.factors, server.head)
        metrics = evaluate_held_out(self.work.model, self.data)
        usable = [visit for visit in visits if visit.fault is None]
        return {
            "round": server.round,
            **_finite(metrics),
            "init_noise": fmean(visit.start_noise for visit in visits) if visits else None,
            "agg_noise": noise,
            "upload_bytes": sum(upload_bytes(visit.start, visit.update) for visit in usable),
            "download_bytes": sum(download_bytes(visit.start, server.head) for visit in visits),
            "train_seconds": sum(visit.train_seconds for visit in visits),
            "clients": [visit.update.client.id for visit in visits],
            "skipped": [visit.update.client.id for visit in visits if visit.fault is not None],
        }


def first_state(work: Workplace, unselected: str) -> ServerState:
    """Return the server before the first round: the adapter just drawn (B = 0) and the head as it stands."""
    scale = next(iter(work.handle.layers.values())).scale
    head = {name: parameter.detach().clone() for name, parameter in work.head.items()}
    return ServerState(Adapter(work.handle.factors(), scale, unselected), head)


def _finite(metrics: Mapping[str, float]) -> Row:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _discard(event: str) -> None:
    pass
