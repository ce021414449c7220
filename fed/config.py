"""A run's configuration: typed, validated once, read from TOML and written back to it.

The defaults are those of the `digits` preset, `threads` apart. Keys are named with dots on the command line and in
error messages: `train.learning_rate` is `learning_rate` in the TOML table `[train]`.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fed.errors import FedError

PRESETS = Path(__file__).parent / "presets"
_EXPECTED = "Input should be "  # how pydantic begins to say what would be right

Rank = Annotated[int, Field(ge=1, le=256)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Table(BaseModel):
    """One table of the TOML file: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelConfig(_Table):
    """The base model: a local checkpoint, or without `path` a small ViT trained on undisturbed digits."""

    path: str | None = None
    pretrain_steps: Annotated[int, Field(ge=1, le=100_000)] = 500
    pretrain_learning_rate: Positive = 2e-3
    pretrain_batch_size: Count = 16


class DataConfig(_Table):
    """The task. `text` and `label` name columns of a JSONL file; `shift` disturbs images only."""

    name: Literal["digits", "jsonl"] = "digits"
    path: str | None = None
    text: str = "text"
    label: str = "label"
    shift: Literal["rotate90", "rotate180", "invert", "none"] = "rotate90"
    test_fraction: Fraction = 0.25
    pretrain_fraction: Fraction = 0.4
    max_length: Annotated[int, Field(ge=2, le=32_768)] = 128

    @model_validator(mode="before")
    @classmethod
    def _infer(cls, values: Any) -> Any:
        """A path means JSONL, and JSONL means no shift, unless the file says otherwise."""
        if not isinstance(values, dict):
            return values
        inferred: dict[str, Any] = {}
        if "path" in values:
            inferred["name"] = "jsonl"
        if values.get("name", inferred.get("name")) == "jsonl":
            inferred["shift"] = "none"
        return {**inferred, **values}


class ClientsConfig(_Table):
    """The population: `count` clients, `per_round` drawn a round, `ranks` dealt out to them in turn.

    `dirichlet_alpha` sets the label skew: small is skewed, `"iid"` (or `inf`) is none.
    """

    count: Annotated[int, Field(ge=1, le=10_000)] = 20
    per_round: Count = 10
    ranks: Annotated[list[Rank], Field(min_length=1)] = [2, 4, 8, 16]
    dirichlet_alpha: Annotated[float, Field(gt=0)] | Literal["iid"] = 0.5

    @field_validator("dirichlet_alpha")
    @classmethod
    def _infinite_is_iid(cls, value: float | Literal["iid"]) -> float | Literal["iid"]:
        return "iid" if value == float("inf") else value


class AdapterConfig(_Table):
    """The global LoRA adapter: `rank` modules a matrix, scale alpha/rank, or alpha/√rank if stabilised."""

    rank: Rank = 16
    alpha: Positive = 32.0
    rank_stabilized: bool = False
    target_modules: Annotated[list[str], Field(min_length=1)] | str = "all-linear"
    unselected: Literal["folded", "frozen"] = "folded"


class TrainConfig(_Table):
    """A client's local training, and what its update weighs. `max_grad_norm = 0` turns clipping off."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 2e-3
    weight_decay: NotNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: Count = 16
    local_steps: Count = 3
    head: Literal["train", "freeze"] = "train"
    weighting: Literal["uniform", "samples"] = "uniform"
    max_grad_norm: NotNegative = 0.0


class RunConfig(_Table):
    """Everything a run depends on: the same configuration gives the same files, time fields apart.

    `threads` is how many torch computes with on the CPU; 0 leaves it to torch. `tracker` names where rows go besides.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    method: Literal["fed-plora", "fedit"] = "fed-plora"
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 40
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    tracker: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _check_clients(self)
        _check_data(self)
        return self


def load(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a preset's name or a TOML file, `key=value` overrides applied in order.

    An override's value is read as TOML (`train.learning_rate=1e-3`, `clients.ranks=[4,8]`); where it is none,
    or the key holds text, it is plain text (`data.text=input`). Raises FedError naming key and value.
    """
    return parse(table(source, overrides), where=str(source))


def table(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `load` validates: the nested table of a preset or file, with the overrides applied."""
    values = _read(source)
    apply(values, overrides)
    return values


def apply(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `key=value` overrides in a nested table, in order; FedError naming an unknown key."""
    for override in overrides:
        _apply(values, override)


def parse(table: dict[str, Any], where: str) -> RunConfig:
    """Validate a nested table; `where` names its source in the FedError of an unknown key."""
    for key in _dotted(table):
        _require_known(key, where)
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise FedError(_one_line(error)) from None


def write(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as TOML: under a temporary name first, then renamed."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(tomli_w.dumps(config.model_dump(exclude_none=True)), encoding="utf-8")
    temporary.replace(path)


def preset_names() -> tuple[str, ...]:
    """The names `load` takes in place of a path, sorted."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def _read(source: str | os.PathLike[str]) -> dict[str, Any]:
    path = PRESETS / f"{source}.toml" if str(source) in preset_names() else Path(source)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        presets = ", ".join(preset_names())
        raise FedError(f"no preset or file is called {str(source)!r}; presets: {presets}") from None
    except tomllib.TOMLDecodeError as error:
        raise FedError(f"{path} is not TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FedError(f"cannot read {path} as a TOML file: {error}") from None


def _apply(table: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in the nested table."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise FedError(f"--set takes key=value, e.g. train.learning_rate=0.001; got {override!r}")
    _require_known(key, "--set")
    *parents, last = key.split(".")
    for name in parents:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise FedError(f"--set {override}: {name} is {table!r} in the file, where a table belongs")
    table[last] = _value(text.strip(), holds_text=_fields()[key] in (str, str | None))


def _value(text: str, holds_text: bool) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if len(parsed) != 1 or (holds_text and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Every key with its type, by dotted name, tables included."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        fields[prefix + name] = field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields |= _fields(field.annotation, f"{prefix}{name}.")
    return fields


def _dotted(table: dict[str, Any], prefix: str = "") -> Iterable[str]:
    """Yield the dotted name of every value, and of every empty table."""
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _require_known(key: str, where: str) -> None:
    if key in (known := _fields()):
        return
    raise FedError(f"{where}: unknown key {key!r}; the nearest is {_nearest(key, known)!r}")


def _nearest(key: str, known: Iterable[str]) -> str:
    """The known key most like `key`: as written, or by its last part where the table is wrong or left out."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, 0.9 * last)

    return max(sorted(known), key=likeness)


def _one_line(error: ValidationError) -> str:
    """The first of pydantic's findings as `key is value: what would be right`."""
    findings = error.errors()
    first = findings[0]
    if first["type"] == "value_error" or not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    key = _key(first["loc"])
    if first["type"] == "model_type":
        return f"{key} is {first['input']!r}: a table belongs there"
    messages = [finding["msg"] for finding in findings if _key(finding["loc"]) == key]
    if not all(message.startswith(_EXPECTED) for message in messages):
        return f"{key} is {first['input']!r}: {messages[0]}"
    # A key that takes two types has a finding for each.
    return f"{key} is {first['input']!r}: it should be {' or '.join(text.removeprefix(_EXPECTED) for text in messages)}"


def _key(location: Iterable[int | str]) -> str:
    """A finding's location as a dotted key, without the names pydantic gives to the types of a union."""
    known, key = _fields(), ""
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        elif (candidate := f"{key}.{part}" if key else part) in known:
            key = candidate
    return key


def _check_clients(config: RunConfig) -> None:
    clients, rank = config.clients, config.adapter.rank
    if clients.per_round > clients.count:
        raise ValueError(
            f"clients.per_round is {clients.per_round}: it should be at most clients.count ({clients.count})"
        )
    if max(clients.ranks) > rank:
        raise ValueError(f"clients.ranks is {clients.ranks}: every rank should be at most adapter.rank ({rank})")
    dealt = clients.ranks[: clients.count]
    if config.method == "fedit" and set(dealt) != {rank}:
        raise ValueError(
            f"clients.ranks is {clients.ranks}: FedIT needs every rank equal to adapter.rank ({rank}); "
            "mixed ranks take method = 'fed-plora'"
        )


def _check_data(config: RunConfig) -> None:
    data, path = config.data, config.model.path
    if data.name == "digits":
        if data.path is not None:
            raise ValueError(f"data.path is {data.path!r}: the digits need no file; data.name should be 'jsonl'")
        if path is not None:
            raise ValueError(f"model.path is {path!r}: digits train an embedded ViT; text needs data.path as well")
        if (taken := data.test_fraction + data.pretrain_fraction) >= 1:
            raise ValueError(
                f"data.test_fraction + data.pretrain_fraction is {taken:g}: "
                "it should be below 1, for what is left goes to the clients"
            )
        return
    if data.path is None:
        raise ValueError("data.path is missing: data.name = 'jsonl' needs a JSONL file")
    if path is None:
        raise ValueError("model.path is missing: JSONL data needs a local transformers checkpoint")
    if data.shift != "none":
        raise ValueError(f"data.shift is {data.shift!r}: text takes 'none'")
