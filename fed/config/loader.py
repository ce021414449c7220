"""Reading configurations from presets, TOML files and `--set`, and writing them; errors are one line each."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from fed.config.paths import located
from fed.config.run import CompareConfig, RunConfig, _File
from fed.config.toml_files import bad_character, check_values, parse_toml_or_none, read_toml, shown
from fed.errors import FedError
from fed.files import write_atomically

PRESETS = Path(__file__).parent / "presets"
# Keys that earlier versions named otherwise, with their present names; the files of saved runs may hold them.
RENAMED = {"cohort_size": "clients_per_pass"}
# What settings stood at before they were settings, where that is not their default.
EARLIER: dict[str, dict[str, Any]] = {"model": {"dtype": "float32"}, "train": {"batching": "padded"}}
# Tables with arbitrary keys: the share of clients of each rank, and the arguments of a partitioner.
_OPEN = ("clients.ranks.", "data.partition_options.")
# Settings that may differ between runs of the same experiment.
_APART = ("seed", "tracker")
_EXPECTED = "Input should be "  # how pydantic begins a message that says what is expected
_LONGEST_KEY = 200  # characters; longer ones are compared with no known key

M = TypeVar("M", bound=BaseModel)


def load(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a preset or TOML file, with the `key=value` overrides applied in order.

    The value of an override is read as TOML (`train.learning_rate=1e-3`, `clients.ranks=[4,8]`). If it is not valid
    TOML, or the setting is a string, it is taken as plain text (`data.text=input`). Raises FedError, naming key and
    value, if a setting is unknown or not valid.

    >>> load("digits", ["train.learning_rate=1e-3"]).train.learning_rate
    0.001
    """
    values, _ = table(source, overrides)
    return parse(values, where=str(source))


def load_saved(path: Path) -> RunConfig:
    """Return the configuration that a run saved in its directory, perhaps with an earlier version's names of keys."""
    try:
        return parse(completed(read_toml(path, written=True)), where=str(path))
    except FileNotFoundError:
        raise FedError(f"there is no {path}, the configuration that a run saves") from None


def table(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], CompareConfig]:
    """Return the nested table of a preset or file with overrides applied, and its table `[compare]` separately."""
    values = _read(source)
    apply(values, overrides)
    asked = _validated(_File, {"compare": values.pop("compare", {})}, str(source))
    return values, asked.compare


def apply(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `key=value` overrides such as `a.b=value` in a nested table, in order; raise FedError for an unknown key."""
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise FedError(f"--set takes key=value, e.g. train.learning_rate=0.001; got {shown(override)}")
        _require_known(key, "--set")
        if bad := bad_character(text):  # half a surrogate pair is how Python passes on bytes that are not UTF-8
            held = bad if "NUL" in bad else "other bytes"
            raise FedError(f"--set {key}: its value should be UTF-8 text; it holds {held}")
        *parents, last = key.split(".")
        table = values
        for name in parents:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise FedError(f"--set {shown(override)}: {name} is {shown(table)} in the file, where a table belongs")
        table[last] = _value(text.strip(), f"--set {key}", holds_text=_is_text(_fields().get(key)))


def parse(table: dict[str, Any], where: str) -> RunConfig:
    """Return the configuration of a nested table.

    Raises FedError if a key is unknown or a value not valid; `where` is the name of the table's source in the former.
    """
    return _validated(RunConfig, table, where)


def _validated(model: type[M], table: dict[str, Any], where: str) -> M:
    check_values(table, where)
    for key, _ in flat(table):
        _require_known(key, where)
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise FedError(_one_line(error)) from None


def write(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as TOML; its paths are written absolute, for it may be read from elsewhere."""
    write_atomically(path, tomli_w.dumps(located(config.model_dump(exclude_none=True))))


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets, which `load` takes in place of a path, sorted."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def _read(source: str | os.PathLike[str]) -> dict[str, Any]:
    path = PRESETS / f"{source}.toml" if str(source) in preset_names() else Path(source)
    try:
        return read_toml(path)
    except FileNotFoundError:
        presets = ", ".join(preset_names())
        raise FedError(f"no preset or file is called {shown(str(source))}; presets: {presets}") from None


def _value(text: str, what: str, holds_text: bool) -> Any:
    if holds_text and not text.startswith(('"', "'")):
        return text
    parsed = parse_toml_or_none(f"value = {text}", what)
    return text if parsed is None or len(parsed) != 1 else parsed["value"]


def _is_text(kind: Any) -> bool:
    """Say whether a setting of this type is text, one of several texts, or may also be missing."""
    kinds = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
    plain = {get_args(each)[0] if get_origin(each) is Annotated else each for each in kinds}
    named = {type(value) for each in plain if get_origin(each) is Literal for value in get_args(each)}
    return {each for each in plain if get_origin(each) is not Literal} - {NoneType} | named == {str}


@functools.cache
def _fields(model: type[BaseModel] = _File, prefix: str = "") -> dict[str, Any]:
    """Return the type of every key by dotted name, tables included."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        fields[prefix + name] = field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields |= _fields(field.annotation, f"{prefix}{name}.")
    return fields


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a nested table with its dotted name; empty tables count as values.

    >>> dict(flat({"rounds": 3, "train": {"local_steps": 2}, "data": {}}))
    {'rounds': 3, 'train.local_steps': 2, 'data': {}}
    """
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def renamed(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with keys of earlier versions replaced by their present names."""
    return {RENAMED.get(key, key): value for key, value in table.items()}


def completed(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested table of a saved run with what earlier versions called otherwise, or did not save.

    >>> completed({"cohort_size": 2, "model": {"pretrain_steps": 9}})
    {'clients_per_pass': 2, 'model': {'dtype': 'float32', 'pretrain_steps': 9}, 'train': {'batching': 'padded'}}
    """
    found = renamed(table)
    for name, settings in EARLIER.items():
        if isinstance(inner := found.get(name, {}), dict):
            found[name] = {**settings, **inner}
    return found


def _require_known(key: str, where: str) -> None:
    if key in (known := _fields()) or key.startswith(_OPEN):
        return
    if key in RENAMED:
        raise FedError(f"{where}: {key} is called {RENAMED[key]}")
    if len(key) > _LONGEST_KEY:
        raise FedError(f"{where}: unknown key {shown(key)}; no key is as long")
    raise FedError(f"{where}: unknown key {key!r}; the nearest is {_nearest(key, known)!r}")


def _nearest(key: str, known: Iterable[str]) -> str:
    """Return the known key most similar to `key`.

    The last parts are compared as well as the whole keys, so that a key in a wrong table, or without one, is found.
    """

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, 0.9 * last)

    return max(sorted(known), key=likeness)


def _one_line(error: ValidationError) -> str:
    """Return the first error that pydantic found as `key is value: what is expected`."""
    findings = error.errors()
    first = findings[0]
    if first["type"] == "value_error" or not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    key = _key(first["loc"])
    if first["type"] == "model_type":
        return f"{key} is {shown(first['input'])}: a table belongs there"
    found = [finding for finding in findings if _key(finding["loc"]) == key]
    messages = [finding["msg"] for finding in found]
    if not all(message.startswith(_EXPECTED) for message in messages):
        # One on the value says more than one on the type.
        first = next((finding for finding in found if not finding["type"].endswith("_type")), first)
        return f"{key} is {shown(first['input'])}: {re.sub('^[A-Z][a-z]+ should ', 'it should ', first['msg'])}"
    # For a key that takes two types there is one error for each type.
    expected = " or ".join(text.removeprefix(_EXPECTED) for text in messages)
    return f"{key} is {shown(first['input'])}: it should be {expected}"


def _key(location: Iterable[int | str]) -> str:
    """Return the location of an error as a dotted key, without the parts by which pydantic names types of a union."""
    known, key = _fields(), ""
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        elif (candidate := f"{key}.{part}" if key else part) in known:
            key = candidate
    return key


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run by dotted key, without the seed and the tracker."""
    table = config.model_dump(exclude_none=True)
    return {key: value for key, value in flat(table) if key not in _APART and value != {}}
