"""The clients of a run: their ranks, participation in rounds, numbers of local steps and learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.data.tables import Split
from fed.errors import FedError
from fed.methods import Method
from fed.models.shared_model import SharedModel
from fed.seeding import permutation, torch_seed
from fed.training.losses import client_losses
from fed.training.memory import MIB, SavedTensors, base_bytes, buffer_bytes, tensor_bytes
from fed.types import Client

C = TypeVar("C")


def populate(config: RunConfig, data: FederatedData, shared: SharedModel, method: Method) -> tuple[Client, ...]:
    """Return all clients as they are before the first round.

    Client i has rank `clients.ranks[i mod length]`, or, if `clients.memory_mib` is set, the largest rank that fits the
    memory budget at the same position of that list.

    Raises FedError if a client has no samples, a budget is too small for rank 1, or the method needs equal ranks and
    the budgets give others.
    """
    if empty := [index for index, split in enumerate(data.clients) if len(split) == 0]:
        raise FedError(
            f"client {empty[0]} of {len(data.clients)} has no samples to train on; fewer clients (clients.count) or "
            "another data.partition would be right"
        )
    ranks: Sequence[int] = config.clients.ranks
    if config.clients.memory_mib:
        largest_split = max(data.clients, key=len)
        ranks = ranks_within(config.clients.memory_mib, estimate(shared, config, largest_split), shared.rank)
    clients = tuple(Client(index, ranks[index % len(ranks)], len(split)) for index, split in enumerate(data.clients))
    if method.equal_ranks and any(client.rank != shared.rank for client in clients):
        found = sorted({client.rank for client in clients})
        raise FedError(
            f"clients.memory_mib is {config.clients.memory_mib}: it affords ranks {found}, and {method.title} needs "
            f"every rank equal to adapter.rank ({shared.rank}); mixed ranks take method = 'fed-plora'"
        )
    return clients


def drawn(config: RunConfig, clients: Sequence[C], number: int) -> list[C]:
    """Return the participating clients of round `number`, drawn without replacement and sorted by id."""
    order = permutation(len(clients), config.seed, number, "clients")
    return [clients[index] for index in sorted(order[: config.clients.per_round].tolist())]


def local_steps(config: RunConfig, client: Client) -> int:
    """Return a client's number of local steps a round: from `local_epochs`, `client_steps` or `local_steps`."""
    train = config.train
    if train.local_epochs:
        width = min(train.batch_size, client.n_samples)
        return max(1, math.ceil(train.local_epochs * client.n_samples / width))
    if train.client_steps:
        return train.client_steps[client.id % len(train.client_steps)]
    return train.local_steps


def learning_rate(config: RunConfig, client: Client) -> float:
    """Return a client's learning rate: its entry of `client_learning_rates`, or else the common `learning_rate`."""
    rates = config.train.client_learning_rates
    return rates[client.id % len(rates)] if rates else config.train.learning_rate


class Estimate(NamedTuple):
    """The bytes that a client needs to train r modules in each matrix: `fixed_bytes` + r · `module_bytes`."""

    fixed_bytes: int
    module_bytes: int

    def of(self, rank: int) -> int:
        """Return the bytes at rank r."""
        return self.fixed_bytes + rank * self.module_bytes

    def rank_within(self, budget_bytes: float) -> int:
        """Return the largest rank whose bytes do not exceed the budget; below 1 if not even rank 1 fits."""
        return int((budget_bytes - self.fixed_bytes) // self.module_bytes)


def estimate(shared: SharedModel, config: RunConfig, split: Split) -> Estimate:
    """Return the memory that training takes as a function of rank, for this model, batch size and optimiser.

    `fixed_bytes`: all weights, quantised ones with their scales; the gradient and optimiser state of the head; the
    activations of one batch, `split`'s longest rows, without those of the adapter; a language model's logits of one
    slice of tokens, or the largest weight that is dequantised, if that is more; and, where Fed-PLoRA holds unselected
    modules frozen, all R modules. `module_bytes`: Σ_matrices (K + N) · itemsize of the factors for the values, as much
    again for the gradient and for each optimiser state (AdamW 2, SGD with momentum 1), and a module's activations of
    one batch. Activations are measured at ranks 1 and R and taken to grow linearly. Other temporary buffers and the
    allocator's overhead are not counted.
    """
    train, adapter = config.train, config.adapter
    states = 2 if train.optimizer == "adamw" else int(train.momentum > 0)
    layers = shared.handle.layers.values()
    width_bytes = sum((layer.in_features + layer.out_features) * layer.lora_A.element_size() for layer in layers)
    head = tensor_bytes(shared.head.values()) * (1 + states)
    held = shared.rank * width_bytes if adapter.unselected == "frozen" and config.method == "fed-plora" else 0
    narrow, wide = (_activations(shared, split, train.batch_size, rank) for rank in (1, shared.rank))
    slope = (wide - narrow) // (shared.rank - 1) if shared.rank > 1 else 0
    buffers = buffer_bytes(shared, split.table, min(train.batch_size, len(split)))
    fixed = base_bytes(shared) + head + held + buffers
    return Estimate(fixed + narrow - slope, width_bytes * (2 + states) + slope)


def ranks_within(budgets_mib: Sequence[float], need: Estimate, largest: int) -> list[int]:
    """Return the largest rank that fits each budget, at most `largest`; raise FedError if not even rank 1 fits one."""
    ranks = []
    for budget in budgets_mib:
        rank = need.rank_within(budget * MIB)
        if rank < 1:
            raise FedError(
                f"clients.memory_mib holds {budget:g}: training one module a matrix takes about "
                f"{need.of(1) / MIB:.1f} MiB on this model; it should be at least that"
            )
        ranks.append(min(rank, largest))
    return ranks


def _activations(shared: SharedModel, split: Split, batch_size: int, rank: int) -> int:
    """Return the bytes that the forward of one batch saves for its backward, with `rank` modules in each matrix."""
    before = shared.handle.factors()
    shared.load({matrix: (A[:rank], B[:, :rank]) for matrix, (A, B) in before.items()}, dict(shared.head))
    saved = SavedTensors(shared.model)
    shared.model.train()
    longest = split.longest(batch_size)
    rows = torch.arange(len(longest))
    with saved.watching(True), torch_seed(shared.device, 0, "estimate"):
        _ = client_losses(shared.model, longest.batch(rows), [len(rows)], longest.counted(rows))
        size_bytes = saved.size_bytes
    shared.load(before, dict(shared.head))
    return size_bytes
