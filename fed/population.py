"""The clients of a run: their ranks, who takes part in a round, and how long and how fast each of them trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fed.errors import FedError
from fed.footprint import estimate, ranks_within
from fed.streams import permutation
from fed.types import Client

if TYPE_CHECKING:
    from fed.config import RunConfig
    from fed.data import FederatedData
    from fed.local import Workplace
    from fed.methods import Method


def populate(config: RunConfig, data: FederatedData, work: Workplace, method: Method) -> tuple[Client, ...]:
    """Return every client before its first round, ranks dealt out in turn or as its memory budget affords.

    Raises FedError where a budget affords nothing, or the method cannot serve the ranks that come out.
    """
    ranks: Sequence[int] = config.clients.ranks
    if config.clients.memory_mib:
        largest_split = max(data.clients, key=len)
        ranks = ranks_within(config.clients.memory_mib, estimate(work, config, largest_split), work.rank)
    clients = tuple(Client(index, ranks[index % len(ranks)], len(split)) for index, split in enumerate(data.clients))
    if method.equal_ranks and any(client.rank != work.rank for client in clients):
        found = sorted({client.rank for client in clients})
        raise FedError(
            f"clients.memory_mib is {config.clients.memory_mib}: it affords ranks {found}, and {method.title} needs "
            f"every rank equal to adapter.rank ({work.rank}); mixed ranks take method = 'fed-plora'"
        )
    return clients


def drawn(config: RunConfig, clients: Sequence[Client], number: int) -> list[Client]:
    """Return the clients of round `number` by ascending id, drawn without replacement."""
    order = permutation(len(clients), config.seed, number, "clients")
    return [clients[index] for index in sorted(order[: config.clients.per_round].tolist())]


def local_steps(config: RunConfig, client: Client) -> int:
    """Return how many batches a client trains on in a round: its epochs, its own steps, or the steps of all."""
    train = config.train
    if train.local_epochs:
        width = min(train.batch_size, client.n_samples)
        return max(1, math.ceil(train.local_epochs * client.n_samples / width))
    if train.client_steps:
        return train.client_steps[client.id % len(train.client_steps)]
    return train.local_steps


def learning_rate(config: RunConfig, client: Client) -> float:
    """Return a client's own learning rate, or that of all."""
    rates = config.train.client_learning_rates
    return rates[client.id % len(rates)] if rates else config.train.learning_rate
