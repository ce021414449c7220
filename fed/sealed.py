"""JSON files that hold a digest of their own content, so that a damaged one is noticed when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed.errors import FedError
from fed.files import digest, write_atomically


def write_sealed(path: Path, facts: Mapping[str, Any]) -> None:
    """Write values as JSON with the digest of their text, in which keys are sorted."""
    text = json.dumps(facts, sort_keys=True)
    write_atomically(path, f'{{"digest": "{digest(text.encode())}", "facts": {text}}}\n')


def read_sealed(path: Path, plain: bool = False) -> dict[str, Any]:
    """Return the values of a file that `write_sealed` wrote; with `plain` also of a JSON object without a digest.

    Earlier versions wrote such objects. Raises FedError if the file cannot be read or does not fit its digest.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FedError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise FedError(f"{str(path)!r} is damaged: it holds no JSON object")
    if plain and not content.keys() & {"digest", "facts"}:
        return content
    facts = content.get("facts")
    if not isinstance(facts, dict) or content.keys() != {"digest", "facts"} or not _fits(content["digest"], facts):
        raise FedError(f"{str(path)!r} is damaged: it does not fit its digest")
    return facts


def _fits(sealed: Any, facts: dict[str, Any]) -> bool:
    """Return whether a digest is that of values as they stand, or in the order that earlier versions took it in.

    These sorted keys, and numbers among them before they became text: 2 came before 10.
    """
    orders = (lambda: json.dumps(facts), lambda: json.dumps(facts, sort_keys=True), lambda: json.dumps(_by_key(facts)))
    return any(sealed == digest(text().encode()) for text in orders)


def _by_key(value: Any) -> Any:
    """Return a value with its keys sorted, as numbers where all of them are numbers."""
    if isinstance(value, list):
        return [_by_key(each) for each in value]
    if not isinstance(value, dict):
        return value
    numbers = all(key.isascii() and key.isdecimal() for key in value)
    return {key: _by_key(value[key]) for key in sorted(value, key=int if numbers else None)}
