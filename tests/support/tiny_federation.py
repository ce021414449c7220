"""A federation small enough to run in milliseconds: three linear layers, four clients, three labels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, Split
from fed.models.shared_model import SharedModel
from fed.seeding import ClientRandom
from fed.simulation.rounds import Federation
from fed.training.local import Job
from fed.types import Adapter, Client, ClientStart, ClientUpdate, Factors, ServerState

FEATURES, HIDDEN, WIDTH, LABELS = 7, 11, 5, 3
HEAD = ("head",)
MATRICES = ("body.first", "body.second")
# Endings of the names of fields that are measured and differ from run to run.
MEASURED = ("_seconds", "_per_second", "peak_memory_bytes")

_DEFAULTS: dict[str, dict[str, Any]] = {
    "clients": {"count": 4, "per_round": 3, "ranks": [1, 2, 3, 6], "memory_mib": []},
    "adapter": {
        "rank": 6,
        "alpha": 12.0,
        "rank_stabilized": False,
        "target_modules": ["first", "second"],
        "unselected": "folded",
        "selection": "random",
        "dropout": 0.0,
        "dtype": "auto",
    },
    "train": {
        "optimizer": "adamw",
        "learning_rate": 2e-2,
        "client_learning_rates": [],
        "weight_decay": 0.01,
        "momentum": 0.0,
        "batch_size": 4,
        "local_steps": 3,
        "client_steps": [],
        "local_epochs": 0.0,
        "head": "train",
        "weighting": "uniform",
        "max_grad_norm": 0.0,
        "batching": "auto",
        "gradient_checkpointing": False,
    },
    "server": {
        "aggregation": "mean",
        "trim": 0.2,
        "byzantine_share": 0.2,
        "max_update_norm": 0.0,
        "min_updates": 1,
        "optimizer": "fedavg",
        "step_size": 1e-2,
        "beta1": 0.9,
        "beta2": 0.99,
        "tau": 1e-3,
        "patience": 10,
    },
    "engine": {"name": "local", "mode": "simulation"},
    "privacy": {
        "clip": 0.0,
        "noise_multiplier": 0.0,
        "target_epsilon": 0.0,
        "target_rounds": 0,
        "delta": 1e-5,
        "sampling": "public",
        "secret_noise": False,
    },
    "attack": {"kind": "none", "share": 0.3, "factor": 10.0},
    "hetlora": {"weighting": "norm", "prune": False, "decay": 0.99, "penalty": 1e-3},
    "measure": {"noise": True, "similarity": True, "memory": True, "clients": True, "generate": "every"},
}


class _Table(SimpleNamespace):
    """A table of a configuration that is not validated: a run of three rounds on a tiny model fits none of them."""

    def model_dump(self, mode: str = "python") -> dict[str, Any]:
        """Return the table as nested dictionaries, as pydantic's models do."""
        return {name: value.model_dump() if isinstance(value, _Table) else value for name, value in vars(self).items()}

    def model_copy(self, update: dict[str, Any]) -> _Table:
        """Return a copy with other values for some keys, as pydantic's models do."""
        return _Table(**{**vars(self), **update})


def make_config(**changes: Any) -> SimpleNamespace:
    """A run's configuration; `changes` set plain keys, or keys of a table by a mapping: `train={"head": "freeze"}`."""
    tables = {name: _Table(**{**keys, **changes.pop(name, {})}) for name, keys in _DEFAULTS.items()}
    plain = {"seed": 5, "rounds": 3, "method": "fed-plora", "device": "cpu", "checkpoint_every": 1}
    plain |= {"execution": "sequential", "clients_per_pass": 0, "cohort_memory_mib": 0.0, "cohort_compile": False}
    return _Table(**{**plain, **changes}, **tables)


class TinyClassifier(nn.Module):
    """Two linear layers to adapt, and a head; it is called as transformers' classifiers are."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.ModuleDict(
                {"first": nn.Linear(FEATURES, HIDDEN), "second": nn.Linear(HIDDEN, WIDTH, bias=False)}
            )
            self.head = nn.Linear(WIDTH, LABELS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        hidden = self.dropout(torch.tanh(self.body["first"](inputs)))
        logits = self.head(torch.tanh(self.body["second"](hidden)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def make_data(seed: int = 0, sizes: tuple[int, ...] = (9, 2, 14, 5), test_size: int = 23) -> FederatedData:
    """Gaussian features, each with the label whose fixed direction it points along most."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(FEATURES, LABELS, generator=generator)

    inputs = torch.cat([torch.randn(size, FEATURES, generator=generator) for size in (*sizes, test_size)])
    table = DenseTable({"inputs": inputs}, (inputs @ directions).argmax(-1))
    *clients, test = (Split(table, rows) for rows in torch.arange(len(table)).split([*sizes, test_size]))
    names = tuple(f"label {number}" for number in range(LABELS))
    return FederatedData(tuple(clients), test, pretrain=None, undisturbed=None, label_names=names)


def jobs_of(shared: SharedModel, config: Any, data: FederatedData, number: int = 1) -> list[Job]:
    """Return the jobs of all clients in a round of this number."""
    federation = Federation(config, data, shared, print)
    state = federation.beginning()
    state = replace(state, server=replace(state.server, round=number - 1))
    return [federation.job(state, client, ClientRandom(config.seed, number, client.id)) for client in state.clients]


def everything(split: Split) -> dict[str, Tensor]:
    """Return all rows of a split as one batch."""
    return split.batch(torch.arange(len(split)))


def make_factors(rank: int, seed: int, shapes: dict[str, tuple[int, int]]) -> dict[str, Factors]:
    """Return random A (rank, K) and B (N, rank) in fp32 for matrices of shape (N, K)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, K, generator=generator), torch.randn(N, rank, generator=generator))
        for name, (N, K) in shapes.items()
    }


def make_server(rank: int = 6, unselected: str = "folded", fresh: bool = False) -> ServerState:
    """Return a server with two matrices of odd shapes and a head; `fresh`: with B = 0, as at a run's start."""
    factors = make_factors(rank, 0, {"left": (5, 3), "right": (2, 7)})
    if fresh:
        factors = {matrix: (A, torch.zeros_like(B)) for matrix, (A, B) in factors.items()}
    return ServerState(Adapter(factors, 0.5, unselected), {"head.weight": torch.ones(3, 2)})


def update_of(number: int, A: list[list[float]], B: list[list[float]], weight: float, **changes: Any) -> ClientUpdate:
    """Return a client's update of one matrix m: by default of its first modules, and without a head."""
    client, factors = Client(number, len(A), n_samples=1), {"m": (torch.tensor(A), torch.tensor(B))}
    return replace(ClientUpdate(client, factors, {"m": tuple(range(len(A)))}, {}, weight, 1, 0.0), **changes)


def make_update(start: ClientStart, client: Client, seed: int, weight: float = 1.0) -> ClientUpdate:
    """Return an update that a client might send after `start`: its selected modules and head changed at random."""
    generator = torch.Generator().manual_seed(seed)

    def moved(values: Tensor) -> Tensor:
        return values + torch.randn(values.shape, generator=generator)

    factors = {}
    for matrix, (A, B) in start.factors.items():
        chosen = list(start.selected[matrix])
        own_A, own_B = A[chosen], B[:, chosen]
        factors[matrix] = (
            moved(own_A) if "A" in start.trained else own_A,
            moved(own_B) if "B" in start.trained else own_B,
        )
    head = {"head.weight": moved(torch.ones(3, 2))}
    return ClientUpdate(client, factors, start.selected, head, weight, steps=1, loss=0.5, sent=start.trained)
