"""Settings of the tests of PEFT's fused layers."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def fused_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse small calls too: with a backend that is forced, no call is too small."""
    monkeypatch.setenv("PLORA_BACKEND", "torch")
