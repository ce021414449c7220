"""JSON files that hold a digest of their own content, so that a damaged one is noticed when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed.errors import FedError
from fed.files import digest, write_atomically


def write_sealed(path: Path, facts: Mapping[str, Any]) -> None:
    """Write values as JSON with their digest."""
    write_atomically(path, json.dumps({"digest": _digest(facts), "facts": facts}) + "\n")


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
    if not isinstance(facts, dict) or content.keys() != {"digest", "facts"} or content["digest"] != _digest(facts):
        raise FedError(f"{str(path)!r} is damaged: it does not fit its digest")
    return facts


def _digest(facts: Mapping[str, Any]) -> str:
    return digest(json.dumps(facts, sort_keys=True).encode())
