"""Recording calls of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def note_calls(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, what: Callable[..., Any], notes: list | None = None
) -> list:
    """Make `owner.name` append `what(arguments)` to a list before it runs; return the list."""
    found, real = [] if notes is None else notes, getattr(owner, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        found.append(what(*arguments, **named))
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, noted)
    return found
