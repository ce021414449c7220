"""The plan of a comparison: the variants of one configuration, their seeds, and the directory of each run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from fed import config as configuration
from fed.config import MOST_RUNS, PATHS, RunConfig, located, same_setting, settings_of, shown
from fed.errors import FedError
from fed.experiments.variants import Variant, count_of, resolved, variants, varied_key
from fed.files import digest, write_atomically

PLAN = "comparison.toml"
_DIGEST = re.compile(r'digest = "([0-9a-f]*)"\n')  # the first line of the file
_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """The request for a comparison, as the user made it.

    `table` is the resolved configuration that all runs share, made from `source` and `settings`. `methods` are names,
    or `name@r` for a run with every client at rank r. `vary` is `key=value,value,…` or empty. `reference` names the
    variant that the others are compared with; if empty it is the first. Relative paths in `vary` are relative to
    `directory`, or if that is empty to the working directory.
    """

    table: dict[str, Any]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    vary: str = ""
    reference: str = ""
    source: str = ""
    settings: tuple[str, ...] = ()
    directory: str = ""


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
        given = ",".join(map(str, asked.seeds))
        raise FedError(f"--seeds is {shown(given)}: it should name each seed once, e.g. 0,1,2")
    if (runs := count_of(asked.methods, asked.vary) * len(asked.seeds)) > MOST_RUNS:
        raise FedError(f"--methods, --vary and --seeds ask for {runs} runs; a comparison has at most {MOST_RUNS}")
    compared = tuple(variants(asked.table, asked.methods, asked.vary))
    names = [variant.name for variant in compared]
    if twice := next((name for name, times in Counter(names).items() if times > 1), None):
        raise FedError(f"{twice!r} would be compared with itself: every method and value should be named once")
    if asked.reference and asked.reference not in names:
        raise FedError(f"--reference is {shown(asked.reference)}; one of {', '.join(names)} would be right")
    cells = [
        Cell(variant, seed, resolved(asked.table, (*variant.settings, f"seed={seed}"), asked.directory))
        for seed in asked.seeds
        for variant in compared
    ]
    return Plan(asked, compared, tuple(cells))


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return the first difference between two sets of settings, among the keys that both have, or None.

    Names of the same path, one relative and one absolute, are no difference.
    """
    for key in before:
        if key in now and not same_setting(key, before[key], now[key]):
            return f"{key} = {shown(before[key])} there, {shown(now[key])} here"
    return None


def write(asked: Request, directory: Path) -> None:
    """Write the request as `comparison.toml`, with a digest of its text in the first line.

    Its paths are written absolute, for the file may be read from elsewhere.
    """
    content = asdict(asked)
    content["config"] = located(content.pop("table"))
    if varied_key(asked.vary) in PATHS:
        content["directory"] = str(Path(asked.directory).absolute())
    text = tomli_w.dumps(content)
    write_atomically(directory / PLAN, f'digest = "{digest(text.encode())}"\n{text}')


def read(directory: Path) -> Request:
    """Read the request of a comparison from its directory; raise FedError if there is none, or it was changed."""
    path = directory / PLAN
    try:
        text = configuration.read_toml_text(path, written=True)
    except FileNotFoundError:
        raise FedError(f"{str(directory)!r} is not a comparison's directory: there is no {PLAN} in it") from None
    first = _DIGEST.match(text)
    fits = first is None or digest(text[first.end() :].encode()) == first[1]
    content = configuration.parse_toml(text, str(path)) if fits else {}
    if not fits or (first is None and "digest" in content):
        raise FedError(
            f"{path} was changed or damaged: it does not fit its digest; give the compare command again with a new "
            "--out, or delete the line of the digest if the change is meant"
        )
    return _request_of(content, path)


def _request_of(content: dict[str, Any], path: Path) -> Request:
    """Return the request that a comparison's file holds; raise FedError, naming the key, if it is malformed."""
    known = ("digest", "config", *(field.name for field in fields(Request) if field.name != "table"))
    if unknown := next((key for key in content if key not in known), None):
        raise FedError(f"{path} is not what a comparison writes: unknown key {shown(unknown)}")

    def of(key: str, fits: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
        if key not in content and default is not None:
            return default
        if key not in content or not fits(content[key]):
            there = f"{key} is {shown(content[key])}" if key in content else f"{key} is missing"
            raise FedError(f"{path} is not what a comparison writes: {there}; it should be {expected}")
        return content[key]

    return Request(
        configuration.completed(of("config", lambda value: isinstance(value, dict), "a table of settings")),
        tuple(of("methods", _are_texts, "a list of names")),
        tuple(of("seeds", _are_seeds, f"a list of numbers from 0 to {_LARGEST_SEED}")),
        of("vary", _is_text, "text"),
        of("reference", _is_text, "text"),
        of("source", _is_text, "text"),
        tuple(of("settings", _are_texts, "a list of texts")),
        of("directory", _is_text, "text", default=""),
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not configuration.bad_character(value)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_seeds(value: object) -> bool:
    return isinstance(value, list) and all(type(seed) is int and 0 <= seed <= _LARGEST_SEED for seed in value)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds in a text such as `0,1,2` or `0-4`; raise FedError if it is not of this form.

    >>> parse_seeds("0-2"), parse_seeds("7,1")
    ((0, 1, 2), (7, 1))
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,10})(?:-([0-9]{1,10}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise FedError(f"--seeds is {shown(text)}: it should be numbers such as 0,1,2 or a range such as 0-4")
        first, last = int(match[1]), int(match[2] or match[1])
        if last > _LARGEST_SEED:
            raise FedError(f"--seeds is {shown(text)}: a seed is at most {_LARGEST_SEED}")
        if len(seeds) + last - first >= MOST_RUNS:
            raise FedError(f"--seeds is {shown(text)}: a comparison has at most {MOST_RUNS} runs")
        seeds.extend(range(first, last + 1))
    return tuple(seeds)
