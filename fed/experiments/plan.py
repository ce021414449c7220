"""The plan of a comparison: the variants of one configuration, their seeds, and the directory of each run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fed import config as configuration
from fed.config import RunConfig, settings_of
from fed.errors import FedError
from fed.experiments.variants import Variant, resolved, variants
from fed.files import read_text, write_atomically

PLAN = "comparison.toml"


@dataclass(frozen=True)
class Request:
    """The request for a comparison, as the user made it.

    `table` is the resolved configuration that all runs share, made from `source` and `settings`. `methods` are names,
    or `name@r` for a run with every client at rank r. `vary` is `key=value,value,…` or empty. `reference` names the
    variant that the others are compared with; if empty it is the first.
    """

    table: dict[str, Any]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    vary: str = ""
    reference: str = ""
    source: str = ""
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: a variant with a seed, and its configuration."""

    variant: Variant
    seed: int
    config: RunConfig

    @property
    def path(self) -> Path:
        """The run's directory, relative to that of the comparison."""
        return Path("runs", self.variant.name, f"seed-{self.seed}")

    @property
    def label(self) -> str:
        """The run's name in messages and progress bars."""
        return f"{self.variant.label}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A resolved request: its variants in order, and a cell for each variant and seed, ordered by seed first."""

    request: Request
    variants: tuple[Variant, ...]
    cells: tuple[Cell, ...]

    @property
    def reference(self) -> Variant:
        """The variant that the others are compared with."""
        wanted = self.request.reference or self.variants[0].name
        return next(variant for variant in self.variants if variant.name == wanted)

    def common(self) -> dict[str, Any]:
        """Return the settings that are the same in all runs, by dotted key, without seed and tracker."""
        first, *others = [settings_of(cell.config) for cell in self.cells]
        return {
            key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)
        }


def request(
    source: str | Path,
    settings: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    vary: str = "",
    reference: str = "",
) -> Request:
    """Return the request for a comparison; arguments that are empty are taken from the source's table `[compare]`.

    Without `methods`, it compares the configuration's own method if `vary` is given or `[compare]` names no methods.
    """
    table, asked = configuration.table(source, settings)
    own = table.pop("method", configuration.RunConfig.model_fields["method"].default)
    table.pop("seed", None)
    # The table is checked with Fed-PLoRA, which takes any ranks; `plan` checks each variant with its own method.
    shared = configuration.parse({**table, "method": "fed-plora"}, where=str(source)).model_dump(exclude_none=True)
    del shared["method"], shared["seed"]
    return Request(
        table=shared,
        methods=tuple(methods or ([] if vary else asked.methods) or [own]),
        seeds=tuple(seeds or asked.seeds),
        vary=vary or asked.vary,
        reference=reference or asked.reference,
        source=str(source),
        settings=tuple(settings),
    )


def plan(asked: Request) -> Plan:
    """Resolve every variant with every seed; raise FedError if one is not valid or two are the same."""
    if not asked.seeds or len(set(asked.seeds)) < len(asked.seeds):
        raise FedError(f"--seeds is {','.join(map(str, asked.seeds))!r}: it should name each seed once, e.g. 0,1,2")
    compared = tuple(variants(asked.table, asked.methods, asked.vary))
    names = [variant.name for variant in compared]
    for name in names:
        if names.count(name) > 1:
            raise FedError(f"{name!r} would be compared with itself: every method and value should be named once")
    if asked.reference and asked.reference not in names:
        raise FedError(f"--reference is {asked.reference!r}; one of {', '.join(names)} would be right")
    cells = [
        Cell(variant, seed, resolved(asked.table, (*variant.settings, f"seed={seed}")))
        for seed in asked.seeds
        for variant in compared
    ]
    return Plan(asked, compared, tuple(cells))


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return the first difference between two sets of settings, among the keys that both have, or None."""
    for key in before:
        if key in now and before[key] != now[key]:
            return f"{key} = {before[key]!r} there, {now[key]!r} here"
    return None


def write(asked: Request, directory: Path) -> None:
    """Write the request as `comparison.toml`."""
    content = asdict(asked)
    content["config"] = content.pop("table")
    write_atomically(directory / PLAN, tomli_w.dumps(content))


def read(directory: Path) -> Request:
    """Read the request of a comparison from its directory; raise FedError if there is none."""
    path = directory / PLAN
    try:
        content = tomllib.loads(read_text(path))
        return Request(
            configuration.renamed(content["config"]),
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
    """Return the seeds in a text such as `0,1,2` or `0-4`; raise FedError if it is not of this form.

    >>> parse_seeds("0-2"), parse_seeds("7,1")
    ((0, 1, 2), (7, 1))
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise FedError(f"--seeds is {text!r}: it should be numbers such as 0,1,2 or a range such as 0-4")
        seeds.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(seeds)
