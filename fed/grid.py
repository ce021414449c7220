"""A comparison's plan: the variants of one configuration, the seeds they run with, and where each run lies."""

from __future__ import annotations

import copy
import itertools
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from fed import config as configuration
from fed.errors import FedError
from fed.report import method_name

if TYPE_CHECKING:
    from fed.config import RunConfig

PLAN = "comparison.toml"
# What two runs may differ in and still be the same experiment.
_APART = ("seed", "tracker")
# Methods whose clients all train the whole adapter.
_EQUAL_RANKS = frozenset({"fedit", "ffa-lora", "fedex-lora", "fedsa-lora", "rolora"})
_CLOSING = {"[": "]", "{": "}", '"': '"', "'": "'"}


@dataclass(frozen=True)
class Request:
    """What is to be compared, as asked for.

    `table` is the resolved configuration all runs share, `source` and `settings` what it was made of. `methods`
    are names, `name@r` for every client at rank r; `vary` is `key=value,value,…` or empty; `reference` names the
    variant the others are held against, the first if empty.
    """

    table: dict[str, Any]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    vary: str = ""
    reference: str = ""
    source: str = ""
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One thing compared: its directory's name, how it is shown, its settings, and what they do to the ranks."""

    name: str
    label: str
    settings: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of the grid; `path` is its directory below the comparison's."""

    variant: Variant
    seed: int
    config: RunConfig

    @property
    def path(self) -> Path:
        """Where the run lies, relative to the comparison's directory."""
        return Path("runs", self.variant.name, f"seed-{self.seed}")

    @property
    def label(self) -> str:
        """The run's name on screen."""
        return f"{self.variant.label}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A request, resolved: its variants in order, and a cell for each with each seed, seed by seed."""

    request: Request
    variants: tuple[Variant, ...]
    cells: tuple[Cell, ...]

    @property
    def reference(self) -> Variant:
        """The variant the others are held against."""
        wanted = self.request.reference or self.variants[0].name
        return next(variant for variant in self.variants if variant.name == wanted)

    def common(self) -> dict[str, Any]:
        """Return what all runs agree on: dotted key to value, seed and trackers apart."""
        first, *others = [settings_of(cell.config) for cell in self.cells]
        return {
            key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)
        }


def request(
    source: str | Path,
    settings: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    vary: str = "",
    reference: str = "",
) -> Request:
    """Return the request to compare `methods`, by default the configuration's own, on `seeds`."""
    table = configuration.table(source, settings)
    named = table.pop("method", configuration.RunConfig.model_fields["method"].default)
    table.pop("seed", None)
    # Ranks that the file's own method could not serve are no error here: each variant's are checked.
    resolved = configuration.parse({**table, "method": "fed-plora"}, where=str(source)).model_dump(exclude_none=True)
    del resolved["method"], resolved["seed"]
    return Request(resolved, tuple(methods) or (named,), tuple(seeds), vary, reference, str(source), tuple(settings))


def plan(asked: Request) -> Plan:
    """Resolve every variant with every seed; FedError where one cannot be, or where two would be the same."""
    if not asked.seeds or len(set(asked.seeds)) < len(asked.seeds):
        raise FedError(f"--seeds is {','.join(map(str, asked.seeds))!r}: it should name each seed once, e.g. 0,1,2")
    variants = tuple(_variants(asked))
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise FedError(f"{name!r} would be compared with itself: every method and value should be named once")
    if asked.reference and asked.reference not in names:
        raise FedError(f"--reference is {asked.reference!r}; one of {', '.join(names)} would be right")
    cells = [
        Cell(variant, seed, _resolved(asked.table, (*variant.settings, f"seed={seed}")))
        for seed in asked.seeds
        for variant in variants
    ]
    return Plan(asked, variants, tuple(cells))


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return a run's settings that decide its results: dotted key to value."""
    return {key: value for key, value in _flat(config.model_dump(exclude_none=True)) if key not in _APART}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say in which key two sets of settings differ first, comparing the keys both hold; None where they do not."""
    for key in before:
        if key in now and before[key] != now[key]:
            return f"{key} = {before[key]!r} there, {now[key]!r} here"
    return None


def write(asked: Request, directory: Path) -> None:
    """Write the request as `comparison.toml`: under a temporary name first, then renamed."""
    fields = asdict(asked)
    content = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    content["config"] = content.pop("table")
    temporary = directory / f"{PLAN}.tmp"
    temporary.write_text(tomli_w.dumps(content), encoding="utf-8")
    temporary.replace(directory / PLAN)


def read(directory: Path) -> Request:
    """Read a comparison's request back; FedError where there is none."""
    path = directory / PLAN
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return Request(
            content["config"],
            tuple(content["methods"]),
            tuple(content["seeds"]),
            content["vary"],
            content["reference"],
            content["source"],
            tuple(content["settings"]),
        )
    except FileNotFoundError:
        raise FedError(f"{str(directory)!r} is not a comparison's directory: there is no {PLAN} in it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedError(f"{path} is not what a comparison writes: {error}") from None


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `0,1,2` or `0-4`; FedError where it is neither."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise FedError(f"--seeds is {text!r}: it should be numbers such as 0,1,2 or a range such as 0-4")
        seeds.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(seeds)


def _variants(asked: Request) -> Iterator[Variant]:
    """Yield every method with every value of the varied key."""
    methods = [_of_method(asked.table, method) for method in asked.methods]
    key, values = _varied(asked.vary)
    for method, value in itertools.product(methods, values):
        if value is None:
            yield method
            continue
        shown = f"{key.rpartition('.')[2]} {value}"
        yield Variant(
            name=f"{method.name}.{_slug(shown)}",
            label=shown if len(methods) == 1 else f"{method.label}, {shown}",
            settings=(*method.settings, f"{key}={value}"),
            note=method.note,
        )


def _of_method(table: dict[str, Any], asked: str) -> Variant:
    """Return a method's variant: at the configuration's ranks, at R where it needs equal ones, or at the rank given.

    At another rank than R, alpha is set so that the scale s stays what it is.
    """
    method, at, text = asked.partition("@")
    config = _resolved(table, ("method=fed-plora",))
    R, dealt = config.adapter.rank, set(config.clients.ranks[: config.clients.count])
    if at and not (text.isdecimal() and 1 <= int(text) <= R):
        raise FedError(f"--methods holds {asked!r}: after @ there should be a rank from 1 to adapter.rank ({R})")
    if not at and (dealt == {R} or method not in _EQUAL_RANKS):
        return Variant(method, method_name(method), (f"method={method}",))
    rank = int(text) if at else R
    share = rank / R
    alpha = config.adapter.alpha * (share**0.5 if config.adapter.rank_stabilized else share)
    reason = "as asked for" if at else "it needs equal ranks"
    same_scale = "" if rank == R else f", alpha {alpha:g} for the same scale"
    return Variant(
        name=f"{method}@{rank}" if at else method,
        label=f"{method_name(method)} (rank {rank})",
        settings=(f"method={method}", f"clients.ranks=[{rank}]", f"adapter.rank={rank}", f"adapter.alpha={alpha!r}"),
        note=f"{method_name(method)} runs with every client at rank {rank} of R = {R} ({reason}{same_scale})",
    )


def _varied(vary: str) -> tuple[str, list[str | None]]:
    """Split `key=value,value` where a comma stands outside brackets and quotes."""
    if not vary:
        return "", [None]
    key, equals, text = vary.partition("=")
    key = key.strip()
    if key in ("seed", "method"):
        raise FedError(f"--vary {key} is what --{key}s is for")
    values: list[str | None] = [part.strip() for part in _split(text)]
    if not equals or not all(values):
        raise FedError(f"--vary takes key=value,value,… e.g. train.local_steps=1,3,9; got {vary!r}")
    return key, values


def _split(text: str) -> list[str]:
    parts, awaited = [""], [""]
    for character in text:
        if character == "," and not awaited[-1]:
            parts.append("")
            continue
        parts[-1] += character
        if character == awaited[-1]:
            awaited.pop()
        elif character in _CLOSING:
            awaited.append(_CLOSING[character])
    return parts


def _resolved(table: dict[str, Any], settings: Sequence[str]) -> RunConfig:
    changed = copy.deepcopy(table)
    configuration.apply(changed, settings)
    return configuration.parse(changed, where="--methods or --vary")


def _slug(text: str) -> str:
    """Return `text` as part of a directory's name."""
    return re.sub(r"[^a-z0-9._=@]+", "-", text.lower()).strip("-.")


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
