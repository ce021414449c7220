"""The variants of a comparison: methods, at ranks that they support, and values of one setting."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fed import config as configuration
from fed import methods
from fed.config import RunConfig, shown
from fed.errors import FedError
from fed.files import digest

_LONGEST_NAME = 200  # characters of a variant's name
_CLOSING = {"[": "]", "{": "}", '"': '"', "'": "'"}


@dataclass(frozen=True)
class Variant:
    """One of the variants compared.

    `name` is the name of its directory, `label` its name in tables and figures, `settings` are its `key=value`
    settings, and `notes` are sentences on them for readers of the results.
    """

    name: str
    label: str
    settings: tuple[str, ...]
    notes: tuple[str, ...] = ()


def variants(table: dict[str, Any], named: Sequence[str], vary: str) -> Iterator[Variant]:
    """Yield every method with every value of `vary` (`key=value,value,…`, or empty), over the settings of `table`.

    A method is a name as in a configuration, or `name@r` for every client at rank r. Raises FedError if one is neither,
    or if `vary` is malformed or names the seed or the method.
    """
    chosen = [_of_method(table, method) for method in named]
    key, values = _varied(vary)
    for method, value in itertools.product(chosen, values):
        if value is None:
            yield method
            continue
        text = f"{key.rpartition('.')[2]} {value}"
        yield Variant(
            name=_short(f"{method.name}.{_slug(text)}"),
            label=text if len(chosen) == 1 else f"{method.label}, {text}",
            settings=(*method.settings, f"{key}={value}"),
            notes=method.notes,
        )


def count_of(named: Sequence[str], vary: str) -> int:
    """Return how many variants `variants` yields at most."""
    return len(named) * len(_varied(vary)[1])


def varied_key(vary: str) -> str:
    """Return the key that `vary` names, or "" if it is empty."""
    return vary.partition("=")[0].strip()


def _of_method(table: dict[str, Any], asked: str) -> Variant:
    """Return the variant of a method.

    Its clients have the rank r of `name@r` if given, else R if the method needs equal ranks, else the configured ranks.
    If r is not R, alpha is changed so that the scale s stays the same. For methods that select no modules,
    `adapter.selection` is set to its default.
    """
    name, at, text = asked.partition("@")
    method = methods.find(name)
    config = resolved(table, ("method=fed-plora",))
    selection, usual = config.adapter.selection, type(config.adapter).model_fields["selection"].default
    settings, notes = [f"method={name}"], []
    if selection != usual and not method.selects:
        settings.append(f"adapter.selection={usual}")
        notes.append(f"adapter.selection = {selection!r} is for Fed-PLoRA alone: other methods do not select modules")
    R, dealt = config.adapter.rank, set(config.clients.ranks[: config.clients.count])
    if at and not (re.fullmatch("[0-9]{1,3}", text) and 1 <= int(text) <= R):
        raise FedError(f"--methods holds {shown(asked)}: after @ there should be a rank from 1 to adapter.rank ({R})")
    mixed = bool(config.clients.memory_mib) or dealt != {R}
    if not at and not (mixed and method.equal_ranks):
        return Variant(name, method.title, tuple(settings), tuple(notes))
    rank = int(text) if at else R
    share = rank / R
    alpha = config.adapter.alpha * (share**0.5 if config.adapter.rank_stabilized else share)
    reason = "as asked for" if at else "it needs equal ranks"
    same_scale = "" if rank == R else f", alpha {alpha:g} for the same scale"
    notes.insert(0, f"{method.title} runs with every client at rank {rank} of R = {R} ({reason}{same_scale})")
    settings += [f"clients.ranks=[{rank}]", "clients.memory_mib=[]", f"adapter.rank={rank}", f"adapter.alpha={alpha!r}"]
    label = f"{method.title} (rank {rank})"
    return Variant(f"{name}@{rank}" if at else name, label, tuple(settings), tuple(notes))


def _varied(vary: str) -> tuple[str, list[str | None]]:
    """Split `key=value,value` into key and values, at commas that are not within brackets or quotes."""
    if not vary:
        return "", [None]
    key, (_, equals, text) = varied_key(vary), vary.partition("=")
    if key in ("seed", "method"):
        raise FedError(f"--vary {key} is what --{key}s is for")
    values: list[str | None] = [part.strip() for part in _split(text)]
    if not equals or not all(values):
        raise FedError(f"--vary takes key=value,value,… e.g. train.local_steps=1,3,9; got {shown(vary)}")
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


def resolved(table: dict[str, Any], settings: Sequence[str], directory: str = "") -> RunConfig:
    """Return the configuration of a table with settings applied, without changing the table.

    Paths are made absolute if `directory` is given, to which relative ones are relative.
    """
    changed = copy.deepcopy(table)
    configuration.apply(changed, settings)
    if directory:
        changed = configuration.located(changed, directory)
    return configuration.parse(changed, where="--methods or --vary")


def _short(name: str) -> str:
    """Return a directory's name as it is, or if a file system would not take it, its beginning and its digest."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 33]}-{digest(name.encode())}"


def _slug(text: str) -> str:
    """Return `text` in a form that can be part of a directory's name."""
    return re.sub(r"[^a-z0-9._=@]+", "-", text.lower()).strip("-.")
