"""What passes between server, clients and methods: frozen records of factors, selections and heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

from torch import Tensor


class Metrics(TypedDict, total=False):
    """What a model reaches on the test set; `validation_…` are the same on the validation set, where there is one."""

    accuracy: float  # 0 … 1; of instructions the share of answers that are exactly right
    loss: float | None  # mean cross-entropy in nats, of samples or of the answers' tokens
    rouge_1: float | None  # of instructions: mean ROUGE-1 and ROUGE-L of the generated answers, 0 … 1
    rouge_l: float | None
    validation_accuracy: float
    validation_loss: float | None
    validation_rouge_1: float | None
    validation_rouge_l: float | None


class CentralisedRow(Metrics, total=False):
    """What LoRA trained on all clients' samples together reaches after so many steps."""

    steps: int
    train_seconds: float


class Row(Metrics, total=False):
    """A line of `rounds.jsonl`: what a round was measured by; round 0 is the unadapted model.

    What nothing was there to measure, or was not to be measured, is None, and so is a metric that is not finite.
    Rows of earlier versions may lack keys.
    """

    round: int
    # Frobenius norms over all matrices (`fed.simulation.noise`).
    init_noise: float | None  # clients' starts from the server's update, mean over the round's clients
    agg_noise: float | None  # the new server's update from the mean of the clients' updates
    agg_noise_module: float | None  # the same, module by module
    factor_noise: float | None  # A and B of clients' starts from their last ends, in one norm
    factor_noise_A: float | None
    factor_noise_B: float | None
    # Over the network: up for updates that were used, down for all the round's clients.
    upload_bytes: int
    download_bytes: int
    # What training took (`fed.training.memory`).
    trainable_parameters: float | None  # mean over the round's clients
    optimizer_bytes: int | None  # of the client that needs most
    activation_bytes: int | None
    fold_seconds: float  # folding, loading and undoing it, all clients
    train_seconds: float
    peak_memory_bytes: int | None
    clients_per_pass: int | None  # how many trained together, where they do
    client_accuracy: list[float] | None  # of each of `clients`, on its own mix of labels, with its own model
    worst_accuracy: float | None
    clients: list[int]  # ids of those that took part
    steps: list[int]  # that each of them trained
    skipped: list[int]  # ids of those whose update could not be used


def measured(row: Row, field: str) -> Any:
    """Return what a row holds under a field named at run time; None where nothing was measured.

    >>> measured({"round": 1, "accuracy": 0.5}, "accuracy"), measured({"round": 1}, "agg_noise")
    (0.5, None)
    """
    return row.get(field)


# One matrix's down-projection A (R, K) and up-projection B (N, R), in PEFT's layout.
Factors = tuple[Tensor, Tensor]


class Stack(NamedTuple):
    """Weighted one-rank modules of one matrix: ΔW = Σ_j w_j b_j a_jᵀ = B diag(w) A.

    A (m, K) and B (N, m) as clients sent them, weights (m,) fp64 with p_i s_i in them: nothing is rounded in scaling.
    """

    A: Tensor
    B: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Options:
    """What a configuration lets methods choose; the same in every round.

    `selection` names a strategy of `fed.methods.selection`. HETLoRA: `hetlora_weighting` is "norm" or "run"; with
    `hetlora_prune` a client cuts its rank r to γr (`hetlora_decay`) once its last modules shrink under a penalty λ
    (`hetlora_penalty`).
    """

    selection: str = "random"
    hetlora_weighting: str = "norm"
    hetlora_prune: bool = False
    hetlora_decay: float = 0.99
    hetlora_penalty: float = 1e-3


@dataclass(frozen=True)
class Adapter:
    """The server's adapter: ΔW = scale · B A for every adapted matrix.

    `factors` maps a matrix (a module's full name in the model) to A (m, K) and B (N, m), in the model's dtype or in
    fp32. m is R, or more where a method keeps ΔW as a stack of more modules, those of largest norm first. `unselected`
    says how clients hold the modules they do not train: "folded" into their weight, or "frozen". `rank` is R; left 0
    it is the largest m there is.
    """

    factors: Mapping[str, Factors]
    scale: float
    unselected: str = "folded"
    rank: int = 0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if self.rank == 0:
            object.__setattr__(self, "rank", max((A.shape[0] for A, _ in self.factors.values()), default=0))

    def scale_of(self, rank: int) -> float:
        """Return the scale an adapter of another rank r has at the same α: α/r, or α/√r if rank-stabilised."""
        ratio = self.rank / rank
        return self.scale * (math.sqrt(ratio) if self.rank_stabilized else ratio)


@dataclass(frozen=True)
class Client:
    """One client: `rank` is its budget r_i, the number of one-rank modules it can train in each matrix.

    `memory` is what its method lets it keep between rounds and `head` its own head where heads are personal; both are
    empty before its first round. `last_round` is the round it last took part in, 0 where it never did. `gradients`
    holds one number a module, (R,), for every matrix where selection goes by gradients.
    """

    id: int
    rank: int
    n_samples: int
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    last_round: int = 0
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerState:
    """What the server holds after `round` rounds: ΔW = base_delta + scale · B A.

    `head` maps parameter names to the trained classification head, each tensor as in the model; it is empty
    where the head is frozen, being then part of the base. `base_delta` is what is folded into the shared base, (N, K)
    fp32 for every matrix, or empty where nothing is; `fold` is what the last round added to it, and `fold_bytes` the
    size of that for every round so far. `visits` counts, (R,) int64 for every matrix, how often each module was
    trained; `moments` belongs to the server's optimiser.
    """

    adapter: Adapter
    head: Mapping[str, Tensor] = field(default_factory=dict)
    round: int = 0
    base_delta: Mapping[str, Tensor] = field(default_factory=dict)
    fold: Mapping[str, Stack] = field(default_factory=dict)
    fold_bytes: tuple[int, ...] = ()
    visits: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    options: Options = Options()


@dataclass(frozen=True)
class TailPenalty:
    """A term of the local loss: `weight` · Σ_matrices ‖A[first:]‖_F ‖B[:, first:]‖_F."""

    first: int
    weight: float


@dataclass(frozen=True)
class ClientStart:
    """What a client begins a round with, upon the base with the server's `base_delta` in it.

    `factors` are its modules, A (m, K) and B (N, m) with m = R, or fewer where it gets only some; `selected` the
    indices it trains, ascending, for every matrix; `unselected` how it holds the others, "folded" or "frozen"; `scale`
    its s in ΔW = s · B A. `trained` names the factors it trains, "AB", "A" or "B"; the other one is held fixed.
    `received` names those that came from the server and were not there already.
    """

    factors: Mapping[str, Factors]
    selected: Mapping[str, tuple[int, ...]]
    scale: float
    unselected: str
    trained: str = "AB"
    received: str = "AB"
    penalty: TailPenalty | None = None


class Footprint(NamedTuple):
    """What a client's training took: trained numbers, and bytes of optimiser state and of activations kept."""

    trainable_parameters: int
    optimizer_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class ClientUpdate:
    """What a client ends with, and of it what it sends back.

    `factors` are compact: column j of B (N, r_i) and row j of A (r_i, K) belong to module
    `selected[matrix][j]`. Modules it was to train and that are not in `selected` are dropped. `weight` is its p_i up to
    a common factor, as the run weighs clients: 1 (uniform) or its number of samples. `loss` is the mean training loss
    of its `steps` steps. `sent` names the factors that go to the server; `memory` is what the client keeps.
    """

    client: Client
    factors: Mapping[str, Factors]
    selected: Mapping[str, tuple[int, ...]]
    head: Mapping[str, Tensor]
    weight: float
    steps: int
    loss: float
    sent: str = "AB"
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    footprint: Footprint | None = None

    @property
    def n_samples(self) -> int:
        """Number of training samples the client holds."""
        return self.client.n_samples


@dataclass(frozen=True)
class RunState:
    """All a run goes on from: the server, its clients by id, and the factors each ended its last round with.

    The last are kept for measuring alone, and not where noise is not measured.
    """

    server: ServerState
    clients: tuple[Client, ...]
    ends: Mapping[int, Mapping[str, Factors]] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientResult:
    """One client's turn in a round: `fault` says why its update cannot be used, or is None."""

    client: Client
    start: ClientStart
    update: ClientUpdate
    start_noise: float | None
    factor_noise: tuple[float, float] | None
    fold_seconds: float
    train_seconds: float
    fault: str | None


@dataclass(frozen=True)
class Round:
    """A round that is over: its row, where the run stands after it, and the updates that were used."""

    row: Row
    state: RunState
    updates: Sequence[ClientUpdate] = ()
