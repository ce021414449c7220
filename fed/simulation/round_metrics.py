"""The measurements of a round, collected in one row: accuracy, noise, bytes, memory and time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, InstructionTable
from fed.methods import Method
from fed.models.shared_model import SharedModel
from fed.seeding import ClientRandom
from fed.simulation.attacks import attackers
from fed.simulation.communication import download_bytes, upload_bytes
from fed.simulation.evaluation import GENERATED, WorkProgress, accuracy_for, evaluate, evaluate_held_out, labels_of
from fed.simulation.noise import agg_noise, agg_noise_module, start_noise
from fed.training.local import Job
from fed.training.memory import peak_bytes
from fed.types import Client, ClientResult, Metrics, Row, RunState, ServerState


class Evaluation(NamedTuple):
    """A server's metrics on the held-out samples; `right` (n,) bool says which test rows are classified correctly."""

    metrics: dict[str, float]
    right: Tensor

    def not_finite(self) -> set[str]:
        """Return the names of the metrics that are not finite."""
        return {name for name, value in self.metrics.items() if not math.isfinite(value)}


@dataclass(frozen=True)
class RoundMetrics:
    """Measurements of rounds on the model that all clients share.

    Evaluating loads a server's or a client's state into that model and leaves it there.
    """

    config: RunConfig
    data: FederatedData
    shared: SharedModel
    method: Method
    progress: WorkProgress | None = None  # called while answers are generated

    def start_noise(self, state: RunState, job: Job) -> float | None:
        """Return a client's initialisation noise, given what is folded into the base now; None if not measured."""
        if not self.config.measure.noise:
            return None
        return start_noise(state.server, job.start, self.shared.base.changed())

    def aggregation_noise(
        self, server: ServerState, usable: Sequence[ClientResult]
    ) -> tuple[float | None, float | None]:
        """Return agg_noise and agg_noise_module.

        Both are None if noise is not measured or no update is usable; the second also if the method does not average
        module by module.
        """
        if not usable or not self.config.measure.noise:
            return None, None
        updates = [result.update for result in usable]
        by_module = agg_noise_module(server, updates) if self.method.by_module else None
        return agg_noise(server, [result.start for result in usable], updates), by_module

    def evaluate(self, server: ServerState) -> Evaluation:
        """Load a server's state into the model and evaluate it on the held-out samples."""
        self.shared.load_server(server)
        right = torch.zeros(len(self.data.test), dtype=torch.bool, device=self.shared.device)
        metrics = evaluate_held_out(
            self.shared.model, self.data, right, generate=self.generates(server.round), progress=self.progress
        )
        return Evaluation(metrics, right)

    def generates(self, number: int) -> bool:
        """Return whether answers are generated after round `number`, in tasks that have any."""
        return self.config.measure.generate == "every" or number in (0, self.config.rounds)

    def not_generated(self, number: int) -> Row:
        """Return None for each measure of generated answers if there are none after round `number`."""
        if self.generates(number) or not isinstance(self.data.test.table, InstructionTable):
            return {}
        kinds = ("",) if self.data.validation is None else ("", "validation_")
        return cast("Row", {f"{kind}{name}": None for kind in kinds for name in GENERATED})

    def row(
        self,
        before: RunState,
        after: RunState,
        results: Sequence[ClientResult],
        noise: float | None = None,
        module_noise: float | None = None,
        clients_per_pass: int | None = None,
        evaluation: Evaluation | None = None,
        late: Sequence[int] = (),
        spent: Row | None = None,
    ) -> Row:
        """Return a round's row, in which figures that are not finite are None, because JSON has no NaN or infinity.

        `spent` is what the row says of privacy.

        `evaluation` is that of the server after the round, which is evaluated here if it is None. Upload bytes count
        the usable updates only, download bytes all clients of the round.
        """
        server = after.server
        metrics, right = evaluation or self.evaluate(server)
        self.shared.load_server(server)
        usable = [result for result in results if result.fault is None]
        head_travels = self.config.train.head == "train"
        head = before.server.head if head_travels else {}
        accuracies = self.client_accuracies(after, results, right) if self.config.measure.clients and results else None
        row = {
            "round": server.round,
            **self.not_generated(server.round),
            **metrics,
            "init_noise": _mean(result.start_noise for result in results),
            "agg_noise": noise,
            "agg_noise_module": module_noise,
            **_factor_noises(results),
            "upload_bytes": sum(upload_bytes(result.start, result.update, head_travels) for result in usable),
            "download_bytes": sum(
                download_bytes(result.start, head, before.server, result.client) for result in results
            ),
            **_footprint(results),
            "fold_seconds": sum(result.fold_seconds for result in results),
            "train_seconds": sum(result.train_seconds for result in results),
            **self.throughput(results),
            "peak_memory_bytes": peak_bytes(self.shared.device) if self.config.measure.memory else None,
            "clients_per_pass": clients_per_pass,
            "client_accuracy": accuracies,
            "worst_accuracy": min(accuracies) if accuracies else None,
            "clients": [result.client.id for result in results],
            "steps": [result.steps for result in results],
            "skipped": [result.client.id for result in results if result.fault is not None],
            "faults": [result.fault for result in results if result.fault is not None],
            "clipped": [result.client.id for result in results if result.fault is None and result.clipped],
            "late": list(late),
        }
        row |= spent or {}
        if self.config.attack.kind != "none":
            row["attackers"] = sorted(attackers(self.config).intersection(result.client.id for result in results))
        return cast("Row", finite(row))

    def throughput(self, results: Sequence[ClientResult]) -> Row:
        """Return the tokens trained on in a second of training, and the share of the computed ones that is padding."""
        tokens, positions = (sum(getattr(one.update, name) for one in results) for name in ("tokens", "positions"))
        if not positions or isinstance(self.data.test.table, DenseTable):
            return {"tokens_per_second": None, "padding_share": None}
        seconds = sum(result.train_seconds for result in results)
        return {"tokens_per_second": tokens / seconds if seconds else None, "padding_share": 1 - tokens / positions}

    def client_accuracies(self, state: RunState, results: Sequence[ClientResult], right: Tensor) -> list[float] | None:
        """Return the accuracy of each client of the round, evaluated with its own model where models are personal.

        `right` (n,) is True for test rows that the global model classifies correctly; with personal models it is
        overwritten. Returns None if all clients share one model and there are no labels to weight by, because then
        every client would have the same accuracy, if no answers are generated in this round, and if a client's rows are
        not here.
        """
        if any(result.client.own_rows for result in results):
            return None
        personal = self.method.personal or self.config.train.head == "personal"
        wanted = labels_of(self.data.test)
        if wanted is None and not (personal and self.generates(state.server.round)):
            return None
        accuracies = []
        for client in (state.clients[result.client.id] for result in results):
            own = labels_of(self.data.clients[client.id])
            if personal:
                self.load_personal(state, client)
                accuracy = evaluate(self.shared.model, self.data.test, right)["accuracy"]
            if wanted is not None and own is not None:
                accuracy = accuracy_for(own, right.cpu(), wanted)
            accuracies.append(accuracy)
        return accuracies

    def load_personal(self, state: RunState, client: Client) -> None:
        """Load a client's personal model: the server's state with the factors and the head that the client kept."""
        server = state.server
        self.shared.load_server(server)
        factors, scale = self.shared.handle.factors(), server.adapter.scale
        if self.method.personal:
            own = self.method.start(server, client, ClientRandom(self.config.seed, server.round + 1, client.id))
            factors, scale = dict(own.factors), own.scale
        self.shared.load(factors, client.head or server.head, scale)


def _factor_noises(results: Sequence[ClientResult]) -> Row:
    """Return the mean factor noises over clients that took part before: √(A² + B²), A and B."""
    pairs = [result.factor_noise for result in results if result.factor_noise is not None]
    return {
        "factor_noise": _mean(math.hypot(*pair) for pair in pairs),
        "factor_noise_A": _mean(pair[0] for pair in pairs),
        "factor_noise_B": _mean(pair[1] for pair in pairs),
    }


def _footprint(results: Sequence[ClientResult]) -> Row:
    """Return the mean number of trained parameters and the largest optimiser and activation memory of any client."""
    taken = [result.footprint for result in results if result.footprint is not None]
    return {
        "trainable_parameters": _mean(float(of_one.trainable_parameters) for of_one in taken),
        "optimizer_bytes": max((of_one.optimizer_bytes for of_one in taken), default=None),
        "activation_bytes": max((of_one.activation_bytes for of_one in taken), default=None),
    }


def finite(figures: Mapping[str, Any]) -> Metrics:
    """Return the figures with None in place of numbers that are not finite, because JSON has no NaN or infinity."""
    return cast("Metrics", {name: _finite(value) for name, value in figures.items()})


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    try:
        return fmean(known) if known else None
    except (OverflowError, ValueError):  # the sum is too large, or holds both infinities
        return None
