"""The configuration's tables on clients, adapter, training and server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from fed.config.fields import TABLE, Count, Fraction, NotNegative, Positive

if TYPE_CHECKING:
    pass

Rank = Annotated[int, Field(ge=1, le=256)]


class ClientsConfig(BaseModel):
    """The population: `count` clients, `per_round` drawn a round, `ranks` dealt out to them in turn.

    `per_round` below 1 is a fraction of the clients. `ranks` may also be a table of shares, `{4 = 0.5, 8 = 0.5}`: it is
    resolved into a list. With `memory_mib`, budgets in MiB dealt out in turn, every client gets the largest rank whose
    training fits its budget, and `ranks` is not used. `dirichlet_alpha` sets the label skew: small is skewed,
    `"iid"` (or `inf`) is none.
    """

    model_config = TABLE

    count: Annotated[int, Field(ge=1, le=10_000)] = 20
    per_round: Count = 10
    ranks: Annotated[list[Rank], Field(min_length=1)] = [2, 4, 8, 16]
    memory_mib: list[Positive] = []
    dirichlet_alpha: Annotated[float, Field(gt=0)] | Literal["iid"] = 0.5

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        """Turn a fraction of clients a round, and ranks by share, into a number and a list."""
        if not isinstance(values, dict):
            return values
        count, resolved = values.get("count", cls.model_fields["count"].default), {}
        drawn, ranks = values.get("per_round"), values.get("ranks")
        if isinstance(count, int) and isinstance(drawn, float) and 0 < drawn < 1:
            resolved["per_round"] = max(1, round(drawn * count))
        if isinstance(count, int) and isinstance(ranks, dict):
            resolved["ranks"] = _ranks_by_share(ranks, count)
        return {**values, **resolved}

    @field_validator("dirichlet_alpha")
    @classmethod
    def _infinite_is_iid(cls, value: float | Literal["iid"]) -> float | Literal["iid"]:
        return "iid" if value == float("inf") else value


class AdapterConfig(BaseModel):
    """The global LoRA adapter: `rank` modules a matrix, scale alpha/rank, or alpha/√rank if stabilised.

    `selection` is how Fed-PLoRA picks the modules a client trains, `dropout` LoRA dropout in local training.
    """

    model_config = TABLE

    rank: Rank = 16
    alpha: Positive = 32.0
    rank_stabilized: bool = False
    target_modules: Annotated[list[str], Field(min_length=1)] | str = "all-linear"
    unselected: Literal["folded", "frozen"] = "folded"
    selection: Literal[
        "random", "shared-random", "first", "round-robin", "largest-norm", "least-visited", "gradient"
    ] = "random"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class TrainConfig(BaseModel):
    """A client's local training, and what its update weighs. `max_grad_norm = 0` turns clipping off.

    `client_steps`, dealt out to the clients in turn, or `local_epochs` above 0 stand in place of `local_steps`;
    `client_learning_rates`, dealt out in turn, in place of `learning_rate`, which centralised training keeps to. The
    head is trained and averaged ("train"), trained and kept by each client ("personal"), or left alone ("freeze").
    With `gradient_checkpointing` the backward computes activations again instead of keeping them.
    """

    model_config = TABLE

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 2e-3
    client_learning_rates: list[Positive] = []
    weight_decay: NotNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: Count = 16
    local_steps: Count = 3
    client_steps: list[Count] = []
    local_epochs: NotNegative = 0.0
    head: Literal["train", "personal", "freeze"] = "train"
    weighting: Literal["uniform", "samples"] = "uniform"
    max_grad_norm: NotNegative = 0.0
    gradient_checkpointing: bool = False


class ServerConfig(BaseModel):
    """The server's step: what its method averaged, or Adam with the round's movement as gradient."""

    model_config = TABLE

    optimizer: Literal["fedavg", "fedadam"] = "fedavg"
    step_size: Positive = 1e-2
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3


class HetLoRAConfig(BaseModel):
    """HETLoRA's own choices: what weighs an update, and whether clients prune their rank to `decay` · rank."""

    model_config = TABLE

    weighting: Literal["norm", "run"] = "norm"
    prune: bool = False
    decay: Fraction = 0.99
    penalty: NotNegative = 1e-3


class MeasureConfig(BaseModel):
    """What is measured besides accuracy, loss, bytes and time; each can be left out where it costs too much."""

    model_config = TABLE

    noise: bool = True
    similarity: bool = True
    memory: bool = True
    clients: bool = True


def _ranks_by_share(shares: dict[str, Any], count: int) -> Any:
    """Return a list of ranks, to be dealt out in turn, that gives each its share of `count` clients, to the nearest.

    Ranks are spread evenly; what repeats itself is said once. Raises ValueError for what are no shares of ranks.
    """
    if not all(rank.isdecimal() and 1 <= int(rank) <= 256 for rank in shares):
        raise ValueError(f"clients.ranks is {shares}: its keys should be ranks from 1 to 256")
    if not all(isinstance(share, int | float) and share > 0 for share in shares.values()):
        raise ValueError(f"clients.ranks is {shares}: its shares should be above 0")
    if abs((total := sum(shares.values())) - 1) > 1e-6:
        raise ValueError(f"clients.ranks is {shares}: its shares add up to {total:g}; they should add up to 1")
    given = dict.fromkeys(sorted(shares, key=int), 0)
    dealt: list[int] = []
    for number in range(1, count + 1):
        due = max(given, key=lambda rank: shares[rank] * number - given[rank])
        given[due] += 1
        dealt.append(int(due))
    periods = (length for length in range(1, count + 1) if count % length == 0)
    return next(dealt[:length] for length in periods if dealt[:length] * (count // length) == dealt)
