"""What passes between server, clients and methods: frozen records of factors, selections and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

# One matrix's down-projection A (R, K) and up-projection B (N, R), in PEFT's layout.
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Adapter:
    """The server's adapter: ΔW = scale · B A for every adapted matrix.

    `factors` maps a matrix (a module's full name in the model) to A (R, K) and B (N, R), in the model's
    dtype. `unselected` says how clients hold the modules they do not train: "folded" into their weight, or
    "frozen".
    """

    factors: Mapping[str, Factors]
    scale: float
    unselected: str = "folded"


@dataclass(frozen=True)
class Client:
    """One client: `rank` is its budget r_i, the number of one-rank modules it can train in each matrix."""

    id: int
    rank: int
    n_samples: int


@dataclass(frozen=True)
class ServerState:
    """What the server holds after `round` rounds.

    `head` maps parameter names to the trained classification head, each tensor as in the model; it is empty
    where the head is frozen, being then part of the base.
    """

    adapter: Adapter
    head: Mapping[str, Tensor] = field(default_factory=dict)
    round: int = 0


@dataclass(frozen=True)
class ClientStart:
    """What a client begins a round with.

    `factors` are the modules it was sent, A (R, K) and B (N, R); `selected` the indices it trains,
    ascending, for every matrix; `unselected` how it holds the others, "folded" or "frozen"; `scale` its s in
    ΔW = s · B A.
    """

    factors: Mapping[str, Factors]
    selected: Mapping[str, tuple[int, ...]]
    scale: float
    unselected: str


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back.

    `factors` are compact: column j of B (N, r_i) and row j of A (r_i, K) belong to module
    `selected[matrix][j]`. `weight` is its p_i up to a common factor, as the run weighs clients: 1 (uniform)
    or its number of samples. `loss` is the mean training loss of its `steps` steps.
    """

    client: Client
    factors: Mapping[str, Factors]
    selected: Mapping[str, tuple[int, ...]]
    head: Mapping[str, Tensor]
    weight: float
    steps: int
    loss: float

    @property
    def n_samples(self) -> int:
        """Number of training samples the client holds."""
        return self.client.n_samples
