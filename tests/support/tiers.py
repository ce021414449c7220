"""Values of parametrised tests that only the slow tier plays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def mostly_slow(cases: Sequence[tuple[Any, ...]], count: int) -> list[Any]:
    """Return cases of several parameters, all but the first `count` marked as slow."""
    return [pytest.param(*case, marks=() if place < count else pytest.mark.slow) for place, case in enumerate(cases)]


def slow(*values: Any) -> list[Any]:
    """Return the values of one parameter, marked as slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
