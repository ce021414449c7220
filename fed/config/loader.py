"""Configurations read from presets, TOML files and `--set`, and written back: errors in one line."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from fed.config.run import CompareConfig, RunConfig, _File
from fed.errors import FedError
from fed.files import write_atomically

PRESETS = Path(__file__).parent / "presets"
# Keys of earlier versions by what they are called now; files of saved runs may hold them.
RENAMED = {"cohort_size": "clients_per_pass"}
# Tables with keys of their own: the share of the clients for each rank, and what a partitioner is given.
_OPEN = ("clients.ranks.", "data.partition_options.")
# What two runs may differ in and still be the same experiment.
_APART = ("seed", "tracker")
_EXPECTED = "Input should be "  # how pydantic begins to say what would be right


def load(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a preset's name or a TOML file, `key=value` overrides applied in order.

    An override's value is read as TOML (`train.learning_rate=1e-3`, `clients.ranks=[4,8]`); where it is none,
    or the key holds text, it is plain text (`data.text=input`). Raises FedError naming key and value.

    >>> load("digits", ["train.learning_rate=1e-3"]).train.learning_rate
    0.001
    """
    values, _ = table(source, overrides)
    return parse(values, where=str(source))


def load_saved(path: Path) -> RunConfig:
    """Return the configuration that a run, perhaps of an earlier version, left in its directory."""
    return parse(renamed(_read(path)), where=str(path))


def table(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], CompareConfig]:
    """Return the nested table of a preset or file with the overrides applied, and apart from it its `[compare]`."""
    values = _read(source)
    apply(values, overrides)
    asked = values.pop("compare", {})
    for key, _ in flat({"compare": asked}):
        _require_known(key, str(source))
    try:
        return values, _File.model_validate({"compare": asked}).compare
    except ValidationError as error:
        raise FedError(_one_line(error)) from None


def apply(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `key=value` overrides in a nested table, in order; FedError naming an unknown key."""
    for override in overrides:
        _apply(values, override)


def parse(table: dict[str, Any], where: str) -> RunConfig:
    """Validate a nested table; `where` names its source in the FedError of an unknown key."""
    for key, _ in flat(table):
        _require_known(key, where)
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise FedError(_one_line(error)) from None


def write(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as TOML."""
    write_atomically(path, tomli_w.dumps(config.model_dump(exclude_none=True)))


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
    table[last] = _value(text.strip(), holds_text=_fields().get(key) in (str, str | None))


def _value(text: str, holds_text: bool) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if len(parsed) != 1 or (holds_text and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _fields(model: type[BaseModel] = _File, prefix: str = "") -> dict[str, Any]:
    """Every key with its type, by dotted name, tables included."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        fields[prefix + name] = field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields |= _fields(field.annotation, f"{prefix}{name}.")
    return fields


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a nested table by its dotted name, and every empty table.

    >>> dict(flat({"rounds": 3, "train": {"local_steps": 2}, "data": {}}))
    {'rounds': 3, 'train.local_steps': 2, 'data': {}}
    """
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def renamed(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table that an earlier version saved with its keys called as they are now."""
    return {RENAMED.get(key, key): value for key, value in table.items()}


def _require_known(key: str, where: str) -> None:
    if key in (known := _fields()) or key.startswith(_OPEN):
        return
    if key in RENAMED:
        raise FedError(f"{where}: {key} is called {RENAMED[key]}")
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


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return a run's settings that decide its results: dotted key to value."""
    table = config.model_dump(exclude_none=True)
    return {key: value for key, value in flat(table) if key not in _APART and value != {}}
