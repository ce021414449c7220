"""The data types that server, clients and methods exchange: immutable records of factors, selections and heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

from torch import Tensor


class Metrics(TypedDict, total=False):
    """Metrics on the test set, and under `validation_…` the same on the validation set, if there is one."""

    # 0 … 1; for instructions the share of generated answers that are exactly right, None where none are generated
    accuracy: float | None
    loss: float | None  # mean cross-entropy in nats, over samples or over answer tokens
    rouge_1: float | None  # for instructions only: mean ROUGE-1 and ROUGE-L of the generated answers, 0 … 1
    rouge_l: float | None
    validation_accuracy: float | None
    validation_loss: float | None
    validation_rouge_1: float | None
    validation_rouge_l: float | None


class CentralisedRow(Metrics, total=False):
    """Metrics of centralised LoRA, trained on all clients' samples together, after `steps` steps."""

    steps: int
    train_seconds: float


class Row(Metrics, total=False):
    """The measurements of a round, a line of `rounds.jsonl`; round 0 is the unadapted model.

    A value is None if it was not measured, has no meaning in this run, or is not finite. Rows written by earlier
    versions may lack keys.
    """

    round: int
    # Frobenius norms over all matrices (`fed.simulation.noise`).
    init_noise: float | None  # distance of a client's starting ΔW from the server's, mean over the round's clients
    agg_noise: float | None  # distance of the new server's ΔW from the weighted mean of the clients' ΔW
    agg_noise_module: float | None  # the same distance with the mean taken module by module
    factor_noise: float | None  # distance of a client's starting A and B from those it ended its last round with
    factor_noise_A: float | None
    factor_noise_B: float | None
    # Network traffic: uploads of the usable updates, downloads of all the round's clients.
    upload_bytes: int
    download_bytes: int
    # Cost of training (`fed.training.memory`).
    trainable_parameters: float | None  # mean over the round's clients
    optimizer_bytes: int | None  # largest of any client, as are activation_bytes
    activation_bytes: int | None
    fold_seconds: float  # loading and folding the clients' starts and undoing it, sum over clients
    train_seconds: float
    tokens_per_second: float | None  # trained on, without padding, in a second of training; None if rows are no texts
    padding_share: float | None  # of the tokens computed in training, 0 … 1
    peak_memory_bytes: int | None
    clients_per_pass: int | None  # number of clients trained together; None if they train one after another
    client_accuracy: list[float] | None  # of each of `clients`, for its own label distribution, with its own model
    worst_accuracy: float | None
    clients: list[int]  # ids of the participating clients
    steps: list[int]  # local steps of each of `clients`
    skipped: list[int]  # ids of clients whose update could not be used
    faults: list[str]  # the reason for each of `skipped`, in its order
    clipped: list[int]  # ids of clients whose update was clipped to `server.max_update_norm` before it was used
    late: list[int]  # ids of drawn clients that did not answer in time, on other machines
    noise_std: float | None  # standard deviation of the noise in the server's sums, with `privacy.clip`
    epsilon: float | None  # what the rounds so far have spent of privacy at `delta`; None: without a bound
    delta: float
    attackers: list[int]  # ids of the round's clients that attack, if any do in this run


def measured(row: Row, field: str) -> Any:
    """Return a row's value for a field whose name is known only at run time, or None if it was not measured.

    >>> measured({"round": 1, "accuracy": 0.5}, "accuracy"), measured({"round": 1}, "agg_noise")
    (0.5, None)
    """
    return row.get(field)


# One matrix's down-projection A (R, K) and up-projection B (N, R), in PEFT's layout.
Factors = tuple[Tensor, Tensor]


class Stack(NamedTuple):
    """Weighted one-rank modules of one matrix: ΔW = Σ_j w_j b_j a_jᵀ = B diag(w) A.

    A (m, K) and B (N, m) are as the clients sent them. `weights` (m,) fp64 contain p_i s_i, so that scaling does not
    round A or B.
    """

    A: Tensor
    B: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Options:
    """The settings of methods, the same in every round.

    `selection` names a strategy of `fed.methods.selection`. `aggregation` names the rule by which methods combine
    modules and head, "mean" or one of `fed.methods.robust`, with its `trim` or `byzantine_share`. HETLoRA:
    `hetlora_weighting` is "norm" or "run"; with `hetlora_prune` a client cuts its rank r to γr (`hetlora_decay`) once
    its last modules shrink under a penalty λ (`hetlora_penalty`).
    """

    selection: str = "random"
    hetlora_weighting: str = "norm"
    hetlora_prune: bool = False
    hetlora_decay: float = 0.99
    hetlora_penalty: float = 1e-3
    aggregation: str = "mean"
    trim: float = 0.2
    byzantine_share: float = 0.2


@dataclass(frozen=True)
class Adapter:
    """The server's adapter: ΔW = scale · B A for every adapted matrix.

    `factors` maps a matrix (a module's full name in the model) to A (m, K) and B (N, m), in the model's dtype or in
    fp32. m is R, or more if a method keeps ΔW as a stack of more modules, ordered by decreasing norm. `unselected` is
    how clients hold the modules that they do not train: "folded" into the weight, or "frozen". `rank` is R; 0 stands
    for the largest m of all matrices.
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
        """Return the scale of an adapter of rank r with the same α: α/r, or α/√r if rank-stabilised."""
        ratio = self.rank / rank
        return self.scale * (math.sqrt(ratio) if self.rank_stabilized else ratio)


@dataclass(frozen=True)
class Client:
    """One client: `rank` is its budget r_i, the number of one-rank modules it can train in each matrix.

    `memory` is what its method lets it keep between rounds, empty before its first round. `head` is its own head if
    heads are personal, else empty. `last_round` is the round it last took part in, or 0, and `kept_round` the last one
    with a usable update, after which it kept `memory` and `head`. `gradients` holds a gradient norm for each module,
    (R,) for every matrix, if modules are selected by gradients. The server does not have the rows of a client with
    `own_rows`.
    """

    id: int
    rank: int
    n_samples: int
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    last_round: int = 0
    kept_round: int = 0
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    own_rows: bool = False


@dataclass(frozen=True)
class ServerState:
    """The server's state after `round` rounds: ΔW = base_delta + scale · B A.

    `head` maps parameter names to the trained classification head, in the model's shapes; it is empty if the head is
    frozen, because it is then part of the base. `base_delta` is what is folded into the shared base, (N, K) fp32 by
    matrix, for matrices that have something folded in. `fold` is what the last round added to it, and `fold_bytes` the
    size of these additions for every round so far. `visits` counts how often each module was trained, (R,) int64 for
    every matrix. `moments` are those of the server's optimiser. `idle_rounds` counts the last rounds in a row in which
    no update was usable.
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
    idle_rounds: int = 0


@dataclass(frozen=True)
class TailPenalty:
    """A penalty added to the local loss: `weight` · Σ_matrices ‖A[first:]‖_F ‖B[:, first:]‖_F."""

    first: int
    weight: float


@dataclass(frozen=True)
class ClientStart:
    """What a client starts a round with, on top of a base that includes the server's `base_delta`.

    `factors` are its modules, A (m, K) and B (N, m), with m = R or fewer if it receives only some. `selected` are the
    indices of the modules it trains, ascending, for every matrix; `unselected` is how it holds the others, "folded" or
    "frozen". `scale` is its s in ΔW = s · B A. `trained` names the factors it trains, "AB", "A" or "B"; the other
    factor is held fixed. `received` names the factors it downloads; the client has the other one already. `sends` names
    the factors that it will send, "" if that is what it trains.
    """

    factors: Mapping[str, Factors]
    selected: Mapping[str, tuple[int, ...]]
    scale: float
    unselected: str
    trained: str = "AB"
    received: str = "AB"
    penalty: TailPenalty | None = None
    sends: str = ""


class Footprint(NamedTuple):
    """The cost of a client's training: trainable parameters, and bytes of optimiser state and saved activations."""

    trainable_parameters: int
    optimizer_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class ClientUpdate:
    """What a client ends a round with: its trained modules and head, and which part of them it sends to the server.

    `factors` are compact: column j of B (N, r_i) and row j of A (r_i, K) belong to module `selected[matrix][j]`. If its
    start has a penalty, the client may have dropped the last modules, which are then not in `selected`. `weight` is its
    aggregation weight p_i up to a common factor: 1 (uniform) or its number of samples. `loss` is the mean training loss
    over its `steps` local steps. `sent` names the factors that go to the server; `memory` is what the client keeps.
    `tokens` is how many tokens it trained on, and `positions` how many were computed for that, padding included; rows
    that are no texts count as one each.
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
    tokens: int = 0
    positions: int = 0


class Sent(NamedTuple):
    """What is remembered of an update (`fed.simulation.replays`): its fingerprint and the round it was trained from."""

    version: int
    fingerprint: int


@dataclass(frozen=True)
class RunState:
    """The state of a run between rounds: the server, the clients by id, and the factors each client last ended with.

    `ends` is used only to measure noise, and stays empty if noise is not measured. `sent` is what is remembered of
    each client's last usable updates.
    """

    server: ServerState
    clients: tuple[Client, ...]
    ends: Mapping[int, Mapping[str, Factors]] = field(default_factory=dict)
    sent: Mapping[int, tuple[Sent, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientResult:
    """The result of one client's training in a round; `fault` is the reason why its update is unusable, or None.

    `steps` and `footprint` are those of the training itself, whatever the update says. `sent` is what is remembered of
    the update, and `clipped` says that the server took less of it than the client sent, which is in `update`.
    """

    client: Client
    start: ClientStart
    update: ClientUpdate
    steps: int
    footprint: Footprint | None
    start_noise: float | None
    factor_noise: tuple[float, float] | None
    fold_seconds: float
    train_seconds: float
    fault: str | None
    sent: Sent | None = None
    clipped: bool = False


@dataclass(frozen=True)
class Round:
    """A finished round: its row, the state of the run after it, and the usable updates."""

    row: Row
    state: RunState
    updates: Sequence[ClientUpdate] = ()
