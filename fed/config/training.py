"""The configuration's tables on clients, adapter, training, server, privacy, attacks, HETLoRA and measurements."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fed.config.fields import Count, CountOrNone, Fraction, LearningRate, Name, NotNegative, Positive, Table
from fed.config.toml_files import shown

Rank = Annotated[int, Field(ge=1, le=256)]
_MOST_CLIENTS = 1_000_000


# Beyond these limits numpy draws no shares that are numbers.
Concentration = Annotated[float, Field(ge=1e-6, le=1e9)]


class ClientsConfig(Table):
    """The clients: `count` of them, of which `per_round` are drawn for each round; client i has rank i of `ranks`.

    `ranks` is repeated if it is shorter than `count`. It may also be a table of shares, `{4 = 0.5, 8 = 0.5}`, which is
    converted into a list. `per_round` below 1 is a fraction of the clients. `memory_mib` lists memory budgets in MiB,
    also repeated: each client then gets the largest rank whose training fits its budget, and `ranks` is not used.
    `dirichlet_alpha` sets the label skew: the smaller, the more skewed; `"iid"` or `inf` means none.
    """

    count: Annotated[int, Field(ge=1, le=_MOST_CLIENTS)] = 20
    per_round: Count = 10
    ranks: Annotated[list[Rank], Field(min_length=1, max_length=_MOST_CLIENTS)] = [2, 4, 8, 16]
    memory_mib: Annotated[list[Positive], Field(max_length=_MOST_CLIENTS)] = []
    dirichlet_alpha: Concentration | Literal["iid"] = 0.5

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        """Convert a fractional `per_round` into a number of clients, and a table of rank shares into a list."""
        if not isinstance(values, dict):
            return values
        count, resolved = values.get("count", cls.model_fields["count"].default), {}
        drawn, ranks = values.get("per_round"), values.get("ranks")
        if not isinstance(count, int) or not 1 <= count <= _MOST_CLIENTS:
            return values  # to be refused
        if isinstance(drawn, float) and 0 < drawn < 1:
            resolved["per_round"] = max(1, round(drawn * count))
        if isinstance(ranks, dict):
            resolved["ranks"] = _ranks_by_share(ranks, count)
        return {**values, **resolved}

    @field_validator("dirichlet_alpha", mode="before")
    @classmethod
    def _infinite_is_iid(cls, value: Any) -> Any:
        return "iid" if value == float("inf") else value


class AdapterConfig(Table):
    """The global LoRA adapter: `rank` modules in each matrix, with scale alpha/rank, or alpha/√rank if rank-stabilised.

    `selection` is how Fed-PLoRA chooses the modules that a client trains, and `unselected` how the client holds the
    others. `dropout` is the LoRA dropout of local training. `dtype` is that of the factors; "auto" is float32 over
    weights in half precision, else the weights' own.
    """

    rank: Rank = 16
    alpha: Positive = 32.0
    rank_stabilized: bool = False
    target_modules: Annotated[list[Name], Field(min_length=1)] | str = "all-linear"
    unselected: Literal["folded", "frozen"] = "folded"
    selection: Literal[
        "random", "shared-random", "first", "round-robin", "largest-norm", "least-visited", "gradient"
    ] = "random"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @field_validator("target_modules")
    @classmethod
    def _can_be_matched(cls, value: list[str] | str) -> list[str] | str:
        import plora_kernels as pk  # it loads torch, before which the command line sets how OpenMP's threads wait

        try:
            pk.PLoRAConfig(target_modules=value)
        except pk.PLoRAError as error:
            raise ValueError(f"adapter.{error}") from None
        return value


class TrainConfig(Table):
    """Local training of clients, and the weights of their updates.

    `client_steps`, a list that is repeated over the clients, or `local_epochs` above 0 replaces `local_steps`.
    `client_learning_rates`, also repeated, replaces `learning_rate`, except in centralised training. The head is
    trained and averaged ("train"), trained and kept by each client ("personal"), or not trained ("freeze").
    `weighting` makes the updates count equally ("uniform") or by the clients' numbers of samples ("samples").
    `batching` says how texts of unequal length share a batch: padded to the longest one, in parts of similar lengths
    ("bucketed"), in one sequence without padding ("packed"), or as is fastest ("auto"): packed with flash attention on
    a GPU and else in parts. Batches stay padded where steps are compiled, and with LoRA dropout where clients train one
    after another or classify. `max_grad_norm = 0` turns gradient clipping off. With `gradient_checkpointing` the
    backward recomputes activations instead of keeping them.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: LearningRate = 2e-3
    client_learning_rates: Annotated[list[LearningRate], Field(max_length=_MOST_CLIENTS)] = []
    weight_decay: NotNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: Count = 16
    local_steps: Count = 3
    client_steps: Annotated[list[Count], Field(max_length=_MOST_CLIENTS)] = []
    local_epochs: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    head: Literal["train", "personal", "freeze"] = "train"
    weighting: Literal["uniform", "samples"] = "uniform"
    max_grad_norm: NotNegative = 0.0
    batching: Literal["auto", "padded", "bucketed", "packed"] = "auto"
    gradient_checkpointing: bool = False


class ServerConfig(Table):
    """What the server makes of the updates, and its optimiser.

    `aggregation` is how modules, and the head, of the clients that trained them become one: their "mean", or a rule
    that a minority of hostile clients cannot move far (`fed.methods.robust`): "median"; "trimmed-mean", without the
    share `trim` of the values from each end; "krum", the update nearest to its neighbours where the share
    `byzantine_share` of clients may be hostile. `max_update_norm` above 0 first clips what each client changed, module
    by module, and of the head (`fed.simulation.clipping`). With fewer than `min_updates` usable updates the server
    keeps its state.

    "fedavg" takes the outcome as it is, "fedadam" a step of Adam towards it. A run ends with an error after `patience`
    rounds in a row in which the server kept its state; 0: it never does.
    """

    aggregation: Literal["mean", "median", "trimmed-mean", "krum"] = "mean"
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    byzantine_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    max_update_norm: NotNegative = 0.0
    min_updates: Count = 1

    optimizer: Literal["fedavg", "fedadam"] = "fedavg"
    step_size: LearningRate = 1e-2
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3
    patience: CountOrNone = 10


class PrivacyConfig(Table):
    """Central differential privacy of Fed-PLoRA (`fed.simulation.privacy`); `clip` = 0 turns it off.

    `clip` is the largest L2 norm of what a client changes in all, and noise of `noise_multiplier` times that is added
    to the server's sums. `target_epsilon` above 0 in place of it looks for the noise that spends this much in
    `target_rounds` rounds, at `delta`. `sampling` says whether who is drawn is "public", as the seed tells, or
    "secret". `secret_noise` takes the operating system's randomness, so that the run cannot be repeated.
    """

    clip: NotNegative = 0.0
    noise_multiplier: NotNegative = 0.0
    target_epsilon: NotNegative = 0.0
    target_rounds: CountOrNone = 0
    delta: Fraction = 1e-5
    sampling: Literal["public", "secret"] = "public"
    secret_noise: bool = False


class AttackConfig(Table):
    """A simulated attack (`fed.simulation.attacks`): the `share` of all clients that attack, and of which kind.

    `factor` is how much longer the step of a "scale" or a "sign-flip" is than the one that was trained.
    """

    kind: Literal["none", "label-flip", "scale", "sign-flip", "nan", "shape", "replay"] = "none"
    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    factor: Positive = 10.0


class HetLoRAConfig(Table):
    """Settings of HETLoRA: `prune` lets clients reduce their rank to `decay` · rank, trained with a `penalty`.

    `weighting` makes an update count by the norm of its ΔW ("norm") or as `train.weighting` says ("run").
    """

    weighting: Literal["norm", "run"] = "norm"
    prune: bool = False
    decay: Fraction = 0.99
    penalty: NotNegative = 1e-3


class MeasureConfig(Table):
    """Measurements besides accuracy, loss, bytes and time; each can be switched off to save time.

    `generate` is when a language model answers the test prompts: after every round, or only before the first and after
    the last one ("last"). The loss of the right answers is measured after every round.
    """

    noise: bool = True
    similarity: bool = True
    memory: bool = True
    clients: bool = True
    generate: Literal["every", "last"] = "every"


def _ranks_by_share(shares: dict[str, Any], count: int) -> Any:
    """Return a list of ranks that, repeated over `count` clients, gives each rank its share, as nearly as possible.

    The ranks alternate as evenly as possible, and the list is the shortest one that repeats. Raises ValueError if
    `shares` does not map ranks to positive shares with a sum of 1.
    """
    if not all(re.fullmatch("[1-9][0-9]{0,2}", rank) and int(rank) <= 256 for rank in shares):
        raise ValueError(f"clients.ranks is {shown(shares)}: its keys should be ranks from 1 to 256")
    if not all(type(share) in (int, float) and 0 < share < float("inf") for share in shares.values()):
        raise ValueError(f"clients.ranks is {shown(shares)}: its shares should be above 0")
    if abs((total := sum(map(float, shares.values()))) - 1) > 1e-6:
        raise ValueError(f"clients.ranks is {shown(shares)}: its shares add up to {total:g}; they should add up to 1")
    given = dict.fromkeys(sorted(shares, key=int), 0)
    dealt: list[int] = []
    for number in range(1, count + 1):
        due = max(given, key=lambda rank: shares[rank] * number - given[rank])
        given[due] += 1
        dealt.append(int(due))
    periods = (length for length in range(1, count + 1) if count % length == 0)
    return next(dealt[:length] for length in periods if dealt[:length] * (count // length) == dealt)
