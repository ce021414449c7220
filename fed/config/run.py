"""The configuration of a run as a typed object, and checks that its tables are compatible.

The defaults are those of the `digits` preset, except `threads`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fed.config.data import DataConfig, ModelConfig, check_data
from fed.config.engine import EngineConfig
from fed.config.fields import Name, NotNegative, Table
from fed.config.toml_files import shown
from fed.config.training import (
    AdapterConfig,
    AttackConfig,
    ClientsConfig,
    HetLoRAConfig,
    MeasureConfig,
    PrivacyConfig,
    ServerConfig,
    TrainConfig,
)

Seed = Annotated[int, Field(ge=0, lt=2**32)]
MOST_RUNS = 10_000  # of a comparison


class RunConfig(Table):
    """The configuration of a run; the same one gives the same files, except for times and peak memory.

    `threads` is the number of CPU threads of torch; 0 leaves it to torch. A checkpoint is saved after every
    `checkpoint_every`-th round, or never if 0. `tracker` lists experiment trackers that receive the rows as well.

    `execution` is how a round's clients train: one after another ("sequential"), or several together over one frozen
    base ("cohort"). A cohort has `clients_per_pass` clients; 0 means the number measured to be fastest on this machine.
    `cohort_memory_mib` above 0 limits a cohort to that memory. With `cohort_compile` torch compiles the forward and
    backward of cohorts, which takes about a minute at the start; batches are then padded to `batch_size`, and the step
    in which memory is measured is not compiled.
    """

    seed: Seed = 0
    method: Name = "fed-plora"
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 40
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    tracker: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    checkpoint_every: Annotated[int, Field(ge=0, le=100_000)] = 1
    execution: Literal["sequential", "cohort"] = "sequential"
    clients_per_pass: Annotated[int, Field(ge=0, le=10_000)] = 0
    cohort_memory_mib: NotNegative = 0.0
    cohort_compile: bool = False
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    attack: AttackConfig = AttackConfig()
    hetlora: HetLoRAConfig = HetLoRAConfig()
    measure: MeasureConfig = MeasureConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="before")
    @classmethod
    def _infer(cls, values: Any) -> Any:
        """Hold unselected modules frozen over a quantised base, unless `adapter.unselected` says otherwise."""
        if not isinstance(values, dict):
            return values
        model, adapter = values.get("model"), values.get("adapter", {})
        quantised = isinstance(model, dict) and model.get("quantize", "none") != "none"
        if quantised and isinstance(adapter, dict):
            return {**values, "adapter": {"unselected": "frozen", **adapter}}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.cohort_compile and self.execution != "cohort":
            raise ValueError(f"cohort_compile is true, but execution is {self.execution!r}; 'cohort' would be right")
        check_method(self)
        check_aggregation(self)
        check_attack(self)
        check_privacy(self)
        check_clients(self)
        check_data(self.data, self.model)
        check_quantized(self)
        check_adapter_dtype(self)
        return self


class CompareConfig(Table):
    """Defaults of the options of `fed compare`: the methods, the seeds and the values of a setting to compare.

    `methods` are names, or `name@r` for a run with every client at rank r. `vary` is `key=value,value,…`. `reference`
    names the variant that differences are relative to, by default the first.
    """

    methods: list[Name] = []
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MOST_RUNS)] = [0, 1, 2]
    vary: str = ""
    reference: str = ""


class _File(RunConfig):
    """The contents of a TOML file: the configuration of a run and the table `[compare]`."""

    compare: CompareConfig = CompareConfig()


def check_clients(config: RunConfig) -> None:
    """Raise ValueError if numbers, ranks or local steps of the clients contradict each other or the adapter's rank."""
    clients, rank = config.clients, config.adapter.rank
    if clients.per_round > clients.count:
        raise ValueError(
            f"clients.per_round is {clients.per_round}: it should be at most clients.count ({clients.count})"
        )
    if config.server.min_updates > clients.per_round:
        raise ValueError(
            f"server.min_updates is {config.server.min_updates}: it should be at most clients.per_round "
            f"({clients.per_round})"
        )
    if not clients.memory_mib and max(clients.ranks) > rank:
        raise ValueError(f"clients.ranks is {shown(clients.ranks)}: every rank should be at most adapter.rank ({rank})")
    if config.train.client_steps and config.train.local_epochs:
        raise ValueError(
            f"train.client_steps is {shown(config.train.client_steps)} and train.local_epochs "
            f"{config.train.local_epochs:g}: one of the two may be set"
        )


def check_adapter_dtype(config: RunConfig) -> None:
    """Raise ValueError if AdamW is to keep its moments in float16.

    There the second moment, 0.001 g² after a first gradient g, is 0 for g below 5e-3, and its root divides the step.
    """
    if config.adapter.dtype == "float16" and config.train.optimizer == "adamw":
        raise ValueError(
            "adapter.dtype is 'float16' and train.optimizer 'adamw': the squares of small gradients are 0 in it, and "
            "steps have no bound; adapter.dtype = 'auto' or train.optimizer = 'sgd' would be right"
        )


def check_quantized(config: RunConfig) -> None:
    """Raise ValueError if a base is to be quantised and something would be folded into it, or copied from it."""
    form = config.model.quantize
    if form == "none":
        return
    if config.model.path is None:
        raise ValueError(f"model.quantize is {form!r}: the embedded ViT takes 'none'; a checkpoint needs model.path")
    if fault := quantized_fault(config, f"model.quantize {form!r}"):
        raise ValueError(fault)


def quantized_fault(config: RunConfig, base: str) -> str | None:
    """Return what a run asks of a quantised base, which `base` names, that none can do; None if there is nothing."""
    from fed import methods

    method = methods.find(config.method)
    if config.model.copy_base:
        return f"model.copy_base is true and {base}: a quantised base is never copied"
    if config.adapter.unselected == "folded":
        return (
            f"adapter.unselected is 'folded' and {base}: nothing can be folded into a quantised base; 'frozen' would "
            "be right"
        )
    if method.folds:
        return (
            f"method is {config.method!r} and {base}: {method.title} folds into the base, and nothing can be folded "
            "into a quantised one; method = 'fed-plora' would be right"
        )
    return None


def check_aggregation(config: RunConfig) -> None:
    """Raise ValueError if the method, or the weights, do not go with the server's rule or its clipping."""
    from fed import methods

    method, rule = methods.find(config.method), config.server.aggregation
    if config.server.max_update_norm and method.personal:
        raise ValueError(
            f"server.max_update_norm is {config.server.max_update_norm:g}: {method.title}'s clients keep B, so the "
            "server does not know how far b_j a_jᵀ moved; it takes 0, and server.aggregation = 'median' would be right"
        )
    if rule == "mean":
        return
    if not method.by_module:
        others = ", ".join(repr(name) for name, other in methods.METHODS.items() if other.by_module)
        raise ValueError(
            f"server.aggregation is {rule!r}: {method.title} does not average module by module, so there is nothing to "
            f"take a {rule} of; it takes 'mean'; other rules take method = one of {others}"
        )
    if rule == "krum" and config.train.weighting != "uniform":
        raise ValueError(
            f"server.aggregation is 'krum' and train.weighting {config.train.weighting!r}: Krum picks the update of "
            "one client, so there is nothing to weigh; train.weighting = 'uniform' would be right, or 'median' or "
            "'trimmed-mean', which take weights"
        )


def check_attack(config: RunConfig) -> None:
    """Raise ValueError if nobody would attack, or labels are to be turned that are not there or that others have."""
    attack, data = config.attack, config.data
    if attack.kind != "none" and round(attack.share * config.clients.count) == 0:
        raise ValueError(
            f"attack.share is {attack.share:g}: of {config.clients.count} clients none would attack; it should be "
            f"at least {1 / config.clients.count:.2g}"
        )
    if attack.kind == "label-flip" and data.task != "classification":
        raise ValueError(
            f"attack.kind is 'label-flip' and data.task {data.task!r}: there are no labels; 'sign-flip' would be right"
        )
    if attack.kind == "label-flip" and data.rows_per_client:
        raise ValueError(
            f"attack.kind is 'label-flip' and data.rows_per_client {data.rows_per_client}: clients share rows, so "
            "honest ones would have turned labels too; 'sign-flip' or data.rows_per_client = 0 would be right"
        )


def check_privacy(config: RunConfig) -> None:
    """Raise ValueError if the noise is not defined, or something in the run would break what it guarantees."""
    privacy = config.privacy
    if not privacy.clip:
        if privacy.noise_multiplier or privacy.target_epsilon:
            raise ValueError(
                "privacy.clip is 0.0, and noise is asked for; the largest norm of an update would be right"
            )
        return
    if bool(privacy.noise_multiplier) == bool(privacy.target_epsilon):
        raise ValueError(
            f"privacy.noise_multiplier is {privacy.noise_multiplier:g} and privacy.target_epsilon "
            f"{privacy.target_epsilon:g}: one of the two should be above 0"
        )
    if privacy.target_epsilon and privacy.target_rounds < config.rounds:
        raise ValueError(
            f"privacy.target_rounds is {privacy.target_rounds} and rounds {config.rounds}: the noise for "
            "privacy.target_epsilon has to last for all rounds, so it should be at least that"
        )
    if privacy.secret_noise and config.checkpoint_every > 1:
        raise ValueError(
            f"checkpoint_every is {config.checkpoint_every} and privacy.secret_noise true: rounds that are played "
            "again would spend more than is counted; 1 would be right, or 0"
        )
    wanted: tuple[tuple[str, object, tuple[object, ...], str], ...] = (
        ("method", config.method, ("fed-plora",), "the sensitivity of other methods is another"),
        (
            "adapter.selection",
            config.adapter.selection,
            ("random", "shared-random", "first"),
            "what a client trains, and how often it is trained, has to be known without data",
        ),
        ("train.weighting", config.train.weighting, ("uniform",), "numbers of samples are data"),
        ("train.head", config.train.head, ("train", "freeze"), "the mean of personal heads would be without noise"),
        ("server.aggregation", config.server.aggregation, ("mean",), "the sensitivity of other rules is another"),
        (
            "server.max_update_norm",
            config.server.max_update_norm,
            (0.0,),
            "privacy.clip bounds all that a client moves",
        ),
        ("server.min_updates", config.server.min_updates, (1,), "how many updates are usable depends on data"),
        ("clients.memory_mib", config.clients.memory_mib, ([],), "the ranks that fit depend on clients' rows"),
    )
    for key, value, allowed, why in wanted:
        if value not in allowed:
            right = " or ".join(map(repr, allowed))
            raise ValueError(f"{key} is {value!r} and privacy.clip {privacy.clip:g}: {why}; {right} would be right")


def check_method(config: RunConfig) -> None:
    """Raise ValueError if the method is unknown or does not support the ranks, selection or server's optimiser."""
    from fed import methods

    method = methods.find(config.method)
    ranks, rank = config.clients.ranks, config.adapter.rank
    dealt = ranks[: config.clients.count]
    if method.equal_ranks and not config.clients.memory_mib and set(dealt) != {rank}:
        raise ValueError(
            f"clients.ranks is {shown(ranks)}: {method.title} needs every rank equal to adapter.rank ({rank}); "
            "mixed ranks take method = 'fed-plora'"
        )
    if config.adapter.selection != AdapterConfig.model_fields["selection"].default and not method.selects:
        raise ValueError(
            f"adapter.selection is {config.adapter.selection!r}: {method.title} does not select modules, so it takes "
            "'random', the default; other ways take method = 'fed-plora'"
        )
    if config.server.optimizer != "fedavg" and not method.moves_factors:
        raise ValueError(
            f"server.optimizer is {config.server.optimizer!r}: {method.title} makes its factors anew each round, "
            "so there is nothing to step along; it takes 'fedavg'"
        )
