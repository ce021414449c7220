"""What an adapter's configuration may hold: read as strict JSON, and each field checked for its kind and its range.

PEFT takes many odd values and fails on them later, or takes them for something else: a list of modules that is written
as one text means its letters, and any text that is not empty means true.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from plora_kernels.errors import ConfigError
from plora_kernels.nn.patterns import check_pattern

_MOST_BYTES = 16 << 20  # the largest ones, with a rank for each of many experts, have a few megabytes
_MOST_NESTED = 32
_MOST_RANK = 2**31 - 1
_MOST_ALPHA = 3e38  # of fp32, in which a scale is applied
_TEXT_SHOWN, _LINE_SHOWN = 100, 300  # letters of a value and of another library's error in a message

# Starts that leave the base weight as it is, in any letter case, and beginnings of those that take something from it.
# PEFT does so again when it loads the adapter, except for "lora_ga", whose base has to be saved after the start.
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def parse_config(path: Path, modules: int) -> dict[str, Any]:
    """Return the fields of a configuration's file, checked, for a model of so many modules.

    Raises ConfigError if it is no JSON object, names a field twice, holds NaN or infinity, or if a field's value is of
    another kind than PEFT's.
    """
    where = shown_path(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"has {path.stat().st_size} bytes, too many for an adapter's configuration")
        text = path.read_text(encoding="utf-8-sig")
        written = json.loads(text, object_pairs_hook=without_repeats, parse_constant=_refuse_constant)
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None
    except RecursionError:
        raise ConfigError(f"{where} is not an adapter's configuration: it is nested too deeply") from None
    except (OSError, ValueError, MemoryError) as error:  # not to be read, no JSON, a number of thousands of digits
        raise ConfigError(f"{where} is not an adapter's configuration: {first_line(error)}") from error
    if not isinstance(written, dict):
        raise ConfigError(f"{where} is not an adapter's configuration, but {shown(written)}; a JSON object is needed")
    if sum(1 for _ in _levels(written)) > _MOST_NESTED:
        raise ConfigError(f"{where} is not an adapter's configuration: it is nested too deeply")
    check_fields(where, written, modules)
    return written


def check_fields(where: str, written: Mapping[str, Any], modules: int | None = None) -> None:
    """Raise ConfigError if a field's value is of another kind than PEFT's; `where` starts the message.

    Without a number of `modules` the number of entries is not held against it.
    """
    _check_kinds(where, written)
    if modules is not None:
        _check_counts(where, written, modules)
    _check_entries(where, written)


def refuse_other_fields(where: str, lora: Any, written: Mapping[str, Any]) -> None:
    """Raise ConfigError for fields of a `LoraConfig` that are not understood, unless they have PEFT's default value.

    `written` holds values as the message shows them. A feature that a later version of PEFT brings is refused, never
    ignored.
    """
    fields = {field.name: field for field in dataclasses.fields(lora)}
    for name in sorted(fields.keys() - UNDERSTOOD):
        value, default = getattr(lora, name), _default(fields[name])
        if value != default and (value or default):
            raise ConfigError(f"{where} has {name} = {shown(written.get(name, value))}; only {default!r} is supported")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def shown(value: object) -> str:
    """Return a value as it is written in Python, on one line and cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]}…"


def shown_path(path: Path) -> str:
    """Return a path for a message; one with line breaks or the like is quoted."""
    return str(path) if str(path).isprintable() else repr(str(path))


def first_line(error: BaseException) -> str:
    """Return an error of another library as one line, cut to a length that fits a message."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    line = line if len(line) <= _LINE_SHOWN else f"{line[:_LINE_SHOWN]}…"
    return line if line.isprintable() else repr(line)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a table of JSON; raise ConfigError if it has a name twice: of the two values, one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"has {shown(repeated)} twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not have")


def _levels(value: Any) -> Iterator[int]:
    """Yield how many entries the tables and lists of each level of nesting have together."""
    level = [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        level = [part for parts in level for part in (parts.values() if isinstance(parts, dict) else parts)]
        yield len(level)


# --------------------------------------------------------------------------------------------------------- fields


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and _is_whole(value) and 1 <= value <= _MOST_RANK


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MOST_ALPHA


def _is_probability(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)


def _is_names_or_expression(value: object) -> bool:
    return _is_text(value) or _are_names(value)


def _are_layers(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value)))


_NAMES = "a list of names of modules"
_NAMES_OR_EXPRESSION = f"{_NAMES} or a regular expression"
# For every field that is understood: whether a value is one for it, and what is needed. All but those of `_NEVER_NULL`
# may be null.
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_alpha, "a positive number"),
    "lora_dropout": (_is_probability, "a probability from 0 to below 1"),
    "rank_pattern": (_is_table, "a table of ranks"),
    "alpha_pattern": (_is_table, "a table of numbers"),
    "target_modules": (_is_names_or_expression, _NAMES_OR_EXPRESSION),
    "exclude_modules": (_is_names_or_expression, _NAMES_OR_EXPRESSION),
    "modules_to_save": (_are_names, _NAMES),
    "layers_to_transform": (_are_layers, "a number of a layer, or a list of them"),
    "layers_pattern": (_is_names_or_expression, _NAMES_OR_EXPRESSION),
    **dict.fromkeys(("use_rslora", "inference_mode", "fan_in_fan_out", "ensure_weight_tying"), (_is_flag, "a bool")),
    **dict.fromkeys(("peft_type", "peft_version", "task_type", "revision", "megatron_core"), (_is_text, "a text")),
    "base_model_name_or_path": (_is_text, "a text"),
    "auto_mapping": (_is_table, "a table"),
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), (_is_table, "a table")),
    "runtime_config": (_is_table, "a table"),  # PEFT passes it over
    "qalora_group_size": (_is_whole, "an integer"),
    "init_lora_weights": (lambda value: _is_flag(value) or _is_text(value), "a bool or a text"),
}
_NEVER_NULL = ("r", "lora_alpha", "lora_dropout", "peft_type")
# The fields that are understood, or say nothing of what a saved adapter computes. All others must have their default
# value.
UNDERSTOOD = frozenset(_KINDS)


def _check_kinds(where: str, written: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the field and its value, for what PEFT takes now and fails on later."""
    for name, (fits, needed) in _KINDS.items():
        if name in written and not fits(written[name]) and (written[name] is not None or name in _NEVER_NULL):
            raise ConfigError(f"{where} has {name} = {shown(written[name])}; {needed} is needed")
    _check_start(where, written.get("init_lora_weights"))


def _check_counts(where: str, written: Mapping[str, Any], modules: int) -> None:
    """Raise ConfigError if a field has many more entries than the model has modules.

    PEFT compares every entry with every module, which would take minutes for a file of a million entries.
    """
    for field, value in written.items():
        entries = sum(_levels(value))
        if entries > 1000 + 4 * modules:
            raise ConfigError(f"{where} has {entries} entries in {shown(field)}; the model has {modules} modules")


def _check_entries(where: str, written: Mapping[str, Any]) -> None:
    """Raise ConfigError for a rank or α of a pattern that is none, and for expressions that are none or may hang."""
    for field, (fits, needed) in (("rank_pattern", _KINDS["r"]), ("alpha_pattern", _KINDS["lora_alpha"])):
        for key, value in (written.get(field) or {}).items():
            if not fits(value):
                raise ConfigError(f"{where} has {field}[{shown(key)}] = {shown(value)}; {needed} is needed")
    for field, pattern in _patterns(written):
        check_pattern(pattern, f"{field} in {where}")


def _patterns(written: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the field and the text of all that PEFT takes for regular expressions."""
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"):
        found = written.get(field) or ()
        yield from ((field, pattern) for pattern in ([found] if isinstance(found, str) else found))
    for field in ("target_modules", "exclude_modules"):
        if isinstance(written.get(field), str):
            yield field, written[field]


def _check_start(where: str, start: object) -> None:
    """Raise ConfigError unless `init_lora_weights` leaves the base weight as it is."""
    if isinstance(start, bool | None) or str(start).lower() in _PLAIN_STARTS:
        return
    if str(start).lower().startswith(_CHANGING_STARTS):
        raise ConfigError(
            f"{where} has init_lora_weights = {shown(start)}, which changes the base weight; convert the adapter to "
            "plain LoRA with PEFT first (save_pretrained's path_initial_model_for_weight_conversion)"
        )
    raise ConfigError(
        f"{where} has init_lora_weights = {shown(start)}; known are true, false, {', '.join(_PLAIN_STARTS)}"
    )
