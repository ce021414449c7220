"""Simulated attacks: some clients, drawn by the seed, send something else than what honest training gives.

With x what a client began with, y what it ended with and c = `attack.factor`, an attacker sends of its trained factors
and head

- "label-flip": y, honestly trained on its own rows with label l turned into L − 1 − l, of L labels (Tolpegin et al.,
  "Data Poisoning Attacks Against Federated Learning Systems", ESORICS 2020, arXiv 2007.08432);
- "scale": x + c (y − x), its step made longer (Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020,
  arXiv 1807.00459);
- "sign-flip": x − c (y − x), its step turned round (Damaskinos et al., "AGGREGATHOR", MLSys 2019);
- "nan": NaN; "shape": factors without their last column and row; "replay": in every later round, what it sent in its
  first one.

Attackers say of their steps, tokens and loss what is true. What a client keeps for itself is untouched, but for the
first update of a "replay", which it keeps in its memory under names that begin with `KEPT`, so that an interrupted run
goes on with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fed.config import RunConfig
from fed.config.training import AttackConfig
from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, Split, TextTable
from fed.errors import FedError
from fed.seeding import permutation
from fed.training.local import Job
from fed.types import ClientUpdate, Factors

KEPT = "attack"


def attackers(config: RunConfig) -> frozenset[int]:
    """Return the ids of the clients that attack: `attack.share` of all, rounded, drawn by the run's seed."""
    attack, count = config.attack, config.clients.count
    if attack.kind == "none":
        return frozenset()
    return frozenset(permutation(count, config.seed, "attackers")[: round(attack.share * count)].tolist())


def training_splits(config: RunConfig, data: FederatedData) -> tuple[Split, ...]:
    """Return the rows that each client trains on: the data's own, but with "label-flip" attackers' labels turned.

    All are views of one table, as a cohort needs them. Raises FedError if the rows have no labels.
    """
    if config.attack.kind != "label-flip":
        return data.clients
    table = data.clients[0].table
    if not isinstance(table, DenseTable | TextTable):
        raise FedError("attack.kind is 'label-flip', and the rows have no labels; data.task = 'classification' has")
    labels = table.labels.clone()
    for client in attackers(config):
        rows = data.clients[client].rows.to(labels.device)
        labels[rows] = len(data.label_names) - 1 - labels[rows]
    turned = replace(table, labels=labels)
    return tuple(Split(turned, split.rows) for split in data.clients)


def attacked(settings: AttackConfig, job: Job, update: ClientUpdate) -> ClientUpdate:
    """Return what an attacker sends in place of its update."""
    if settings.kind == "replay":
        return _replay(job, update)
    changes: dict[str, Any] = {
        "scale": lambda begun, ended: _moved(begun, ended, settings.factor),
        "sign-flip": lambda begun, ended: _moved(begun, ended, -settings.factor),
        "nan": lambda begun, ended: torch.full_like(ended, float("nan")),
    }
    if settings.kind == "shape":
        return replace(update, factors={matrix: (A[:, :-1], B[:-1]) for matrix, (A, B) in update.factors.items()})
    if (change := changes.get(settings.kind)) is None:
        return update
    factors: dict[str, Factors] = {}
    for matrix, (A, B) in update.factors.items():
        chosen = list(update.selected[matrix])
        begun_A, begun_B = job.start.factors[matrix]
        factors[matrix] = (
            change(begun_A[chosen], A) if "A" in job.start.trained else A,
            change(begun_B[:, chosen], B) if "B" in job.start.trained else B,
        )
    head = {name: change(job.head[name], value) for name, value in update.head.items()}
    return replace(update, factors=factors, head=head)


def _moved(begun: Tensor, ended: Tensor, factor: float) -> Tensor:
    return (begun.double() + factor * (ended.double() - begun.double())).to(ended.dtype)


def _replay(job: Job, update: ClientUpdate) -> ClientUpdate:
    """Return the client's first update, or in its first round the present one; either way with it in the memory."""
    kept = {name: value for name, value in job.client.memory.items() if name.startswith(f"{KEPT}/")}
    if kept:
        update = _unpacked(kept, update)
    return replace(update, memory={**update.memory, **(kept or _packed(update))})


def _packed(update: ClientUpdate) -> dict[str, Tensor]:
    packed = {f"{KEPT}/head/{name}": value for name, value in update.head.items()}
    for matrix, (A, B) in update.factors.items():
        modules = torch.tensor(update.selected[matrix], dtype=torch.int64)
        packed |= {f"{KEPT}/{kind}/{matrix}": own for kind, own in (("A", A), ("B", B), ("selected", modules))}
    return packed


def _unpacked(kept: Mapping[str, Tensor], update: ClientUpdate) -> ClientUpdate:
    factors = {matrix: (kept[f"{KEPT}/A/{matrix}"], kept[f"{KEPT}/B/{matrix}"]) for matrix in update.factors}
    selected = {matrix: tuple(kept[f"{KEPT}/selected/{matrix}"].tolist()) for matrix in update.factors}
    head = {name: kept[f"{KEPT}/head/{name}"] for name in update.head}
    return replace(update, factors=factors, selected=selected, head=head)
