"""What a round is measured by: accuracy, noise, bytes, memory and time, in one row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fed.data.federated_data import FederatedData
from fed.methods import Method
from fed.models.shared_model import Workplace
from fed.seeding import Source
from fed.simulation.communication import download_bytes, upload_bytes
from fed.simulation.evaluation import accuracy_for, evaluate, evaluate_held_out, labels_of
from fed.simulation.noise import agg_noise, agg_noise_module, start_noise
from fed.training.local import Job
from fed.training.memory import peak_bytes
from fed.types import Client, Row, ServerState, Standing, Visit

if TYPE_CHECKING:
    from fed.config import RunConfig


@dataclass(frozen=True)
class RoundMetrics:
    """Measures rounds on the model that all clients share, and leaves it at a state of the server or of a client."""

    config: RunConfig
    data: FederatedData
    work: Workplace
    method: Method

    def start_noise(self, standing: Standing, job: Job) -> float | None:
        """Return how far a client's start is from the server, as the base now holds it; None if not measured."""
        if not self.config.measure.noise:
            return None
        return start_noise(standing.server, job.start, self.work.base.changed())

    def aggregation_noise(self, server: ServerState, usable: Sequence[Visit]) -> tuple[float | None, float | None]:
        """Return agg_noise and agg_noise_module, None where they are not measured or have no meaning."""
        if not usable or not self.config.measure.noise:
            return None, None
        updates = [visit.update for visit in usable]
        by_module = agg_noise_module(server, updates) if self.method.by_module else None
        return agg_noise(server, [visit.start for visit in usable], updates), by_module

    def row(
        self,
        before: Standing,
        after: Standing,
        visits: Sequence[Visit],
        noise: float | None = None,
        module_noise: float | None = None,
        cohort_size: int | None = None,
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
            "cohort_size": cohort_size,
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
