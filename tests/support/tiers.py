"""Values of parametrised tests that only the slow tier plays."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Return the values of one parameter, marked as slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
