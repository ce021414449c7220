"""Tensors that must be the same, however they are put together."""

from __future__ import annotations

import torch


def assert_equal(found: object, expected: object) -> None:
    """Hold tensors, or lists and mappings of tensors (or of None), to the same numbers to the last bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
