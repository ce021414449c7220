"""Central differential privacy of Fed-PLoRA: every client's whole update clipped, and noise in the server's sums.

Let Δ_i be all that client i changed, from its start: the modules 𝒦_i that it trained, and the head, as one vector, zero
in every other coordinate. In a round with the clients S

    Δ̃_i = Δ_i · min(1, C / ‖Δ_i‖₂),    G = Σ_{i∈S} Δ̃_i + N(0, (z C)² I),    x_j ← x_j + G_j / d_j,

with C = `privacy.clip`, z the noise multiplier, and x_j = (a_j, b_j) of module j, or the head.

**Sensitivity.** Replacing the data of one client by another's changes one Δ̃_i, in whatever coordinates, and so the
sum by at most 2 C in L2. The noise has a standard deviation of z C in every coordinate, those of modules that nobody
trained too, which would otherwise tell who took part; G is thus a Gaussian mechanism of ratio z C / 2 C = z / 2. What
follows is post-processing: the mean of module j gets noise of z C / d_j. Its own sensitivity is 2 C / d_j, most where
few train a module; to divide afterwards gives every module the noise that it needs and not the worst module's.

**Denominators.** |Q_j| would depend on who was drawn and whose update was usable. d_j is fixed in its place: the number
of clients that are expected to train the module in the round, (m / N) Σ_i P(j ∈ 𝒦_i) over all N clients, of which m are
drawn; with "random" selection m Σ_i r_i / (N R), with the other two the module's own place in the order counts. It is
at least 1, and m for the head. An update that cannot be used counts as 0, and no client's update decides on another's:
what the server does elsewhere with updates that grew much, or spoil its state, is not done.

**Selection.** 𝒦_i must not depend on data: "random", "shared-random" and "first" go by seed and rank. "gradient" looks
at the client's rows, "least-visited" counts usable updates; d_j of "largest-norm" and "round-robin" is not worked out.

**Who is drawn.** Whoever knows the seed knows S. With `privacy.sampling = "public"` ε is that of the client that took
part most often, at ratio z / 2 each time. With "secret" it is that of drawing m of N without replacement
(`fed.simulation.privacy_accounting`), which holds only while nobody knows the seed.

**Noise** is keyed by seed, round and matrix, so that a run can be repeated; whoever knows the seed can subtract it, so
there is no protection from them. `privacy.secret_noise` draws it from the operating system instead. Private are the
server's adapter and head, not rows, logs, checkpoints and maps of similarity, which hold figures of single clients.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, arXiv 1710.06963.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed.config import RunConfig
from fed.methods.average import visit_counts
from fed.seeding import permutation, standard_normal
from fed.simulation.clients import drawn
from fed.simulation.privacy_accounting import epsilon, ratio_for, require_accounting
from fed.types import Client, ClientResult, ClientStart, ClientUpdate, Factors, Row, ServerState

SELECTIONS = ("random", "shared-random", "first")


@dataclass(frozen=True)
class PrivateServer:
    """The private aggregation of a run: its configuration, all its clients, and the noise multiplier z."""

    config: RunConfig
    clients: tuple[Client, ...]
    multiplier: float

    @classmethod
    def of(cls, config: RunConfig, clients: tuple[Client, ...]) -> PrivateServer:
        """Return that of a run whose `privacy.clip` is above 0; raise FedError if dp-accounting is not installed."""
        settings = config.privacy
        require_accounting()
        multiplier = settings.noise_multiplier
        if settings.target_epsilon:
            rounds, sampled = settings.target_rounds, config.clients.per_round
            if settings.sampling == "public":
                rounds, sampled = most_often(config, clients, rounds), len(clients)
            multiplier = 2 * ratio_for(settings.target_epsilon, rounds, settings.delta, len(clients), sampled)
        return cls(config, clients, multiplier)

    @property
    def noise_std(self) -> float:
        """z C, the standard deviation of the noise in the server's sums."""
        return self.multiplier * self.config.privacy.clip

    def spent(self, number: int) -> Row:
        """Return what a row says of privacy after round `number`; ε is None where it is infinite, without noise."""
        settings, rounds = self.config.privacy, number
        sampled = self.config.clients.per_round
        if settings.sampling == "public":
            rounds, sampled = most_often(self.config, self.clients, number), len(self.clients)
        return {
            "noise_std": self.noise_std,
            "epsilon": epsilon(self.multiplier / 2, rounds, settings.delta, len(self.clients), sampled),
            "delta": settings.delta,
        }

    def aggregate(self, server: ServerState, results: Sequence[ClientResult]) -> ServerState:
        """Return the server after the round; results with a fault count as 0."""
        usable = [result for result in results if result.fault is None]
        head = server.head if self.config.train.head == "train" else {}
        clipped = [clip_whole(result.start, head, result.update, self.config.privacy.clip) for result in usable]
        factors = {}
        for matrix in server.adapter.factors:
            pairs = zip(usable, clipped, strict=True)
            sent = [(result.update.selected[matrix], changes[matrix]) for result, (changes, _) in pairs]
            factors[matrix] = self._moved(server, matrix, sent)
        moved = {}
        for name, own in server.head.items():
            total = self._noise(server, own, "head", name)
            for _, changes in clipped:
                total += changes[name]
            moved[name] = (own.double() + total / self.config.clients.per_round).to(own.dtype)
        updates = [result.update for result in usable]
        visits = visit_counts(server, updates)
        following = replace(server, adapter=replace(server.adapter, factors=factors), head=moved, visits=visits)
        return replace(following, round=server.round + 1)

    def _moved(self, server: ServerState, matrix: str, sent: Sequence[tuple[Sequence[int], Factors]]) -> Factors:
        """Return a matrix's A and B moved by the noisy sums of what clients sent of their modules."""
        A, B = server.adapter.factors[matrix]
        divisors = self.divisors(server, matrix, A.shape[0]).to(A.device)
        total_A, total_B = self._noise(server, A, "A", matrix), self._noise(server, B, "B", matrix)
        for modules, (change_A, change_B) in sent:
            total_A[list(modules)] += change_A
            total_B[:, list(modules)] += change_B
        trained = divisors > 0  # a module that no client can ever train is left as it is, for all to know
        shares = torch.where(trained, 1 / divisors.clamp(min=1.0), 0.0)
        return (
            torch.where(trained[:, None], (A.double() + shares[:, None] * total_A).to(A.dtype), A),
            torch.where(trained, (B.double() + shares * total_B).to(B.dtype), B),
        )

    def divisors(self, server: ServerState, matrix: str, rank: int) -> Tensor:
        """Return how many clients are expected to train each module in the next round, (R,) fp64, before the floor."""
        budgets = np.array([client.rank for client in self.clients])
        drawn_share = self.config.clients.per_round / len(budgets)
        if self.config.adapter.selection == "random":
            return torch.full((rank,), drawn_share * budgets.sum() / rank, dtype=torch.float64)
        order: NDArray[np.int64] = np.arange(rank)
        if self.config.adapter.selection == "shared-random":
            order = permutation(rank, self.config.seed, server.round + 1, "select", matrix)
        counts = np.zeros(rank)
        counts[order] = [(budgets > place).sum() for place in range(rank)]
        return torch.from_numpy(drawn_share * counts)

    def _noise(self, server: ServerState, like: Tensor, kind: str, name: str) -> Tensor:
        """Return noise of the shape of `like`, fp64 on its device."""
        if self.config.privacy.secret_noise:
            numbers = secret_normal(like.numel())
        else:
            numbers = standard_normal(like.numel(), self.config.seed, server.round + 1, "privacy", kind, name)
        return self.noise_std * torch.from_numpy(numbers).view(like.shape).to(like.device)


def most_often(config: RunConfig, clients: tuple[Client, ...], rounds: int) -> int:
    """Return how often the client that is drawn most often is drawn in the first rounds."""
    counts = np.zeros(len(clients), dtype=np.int64)
    for number in range(1, rounds + 1):
        for client in drawn(config, clients, number):
            counts[client.id] += 1
    return int(counts.max())


def clip_whole(
    start: ClientStart, head: Mapping[str, Tensor], update: ClientUpdate, most: float
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Return what a client changed of its modules and head, fp64, scaled so that the norm of all of it is ≤ `most`.

    `head` is what the client's head began with, empty if it is not sent.
    """
    factors: dict[str, Factors] = {}
    for matrix, (A, B) in update.factors.items():
        chosen = list(update.selected[matrix])
        begun_A, begun_B = start.factors[matrix]
        factors[matrix] = A.double() - begun_A[chosen].double(), B.double() - begun_B[:, chosen].double()
    changes = {name: update.head[name].double() - own.double() for name, own in head.items()}
    parts = [*(own for pair in factors.values() for own in pair), *changes.values()]
    norm = torch.stack([part.norm() for part in parts]).norm().item()
    share = min(1.0, most / norm) if 0 < norm < math.inf else float(norm == 0)  # infinite only beyond fp64
    scaled = {matrix: (share * A, share * B) for matrix, (A, B) in factors.items()}
    return scaled, {name: share * change for name, change in changes.items()}


def secret_normal(size: int) -> NDArray[np.float64]:
    """Return `size` standard normal numbers, fp64, of the operating system's randomness, by Box and Muller."""
    words = np.frombuffer(os.urandom(16 * size), dtype=np.uint64)
    radius, angle = ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(2, size)
    return np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
