"""Equality of tensors and of collections of tensors."""

from __future__ import annotations

import torch


def assert_equal(found: object, expected: object) -> None:
    """Assert that tensors, or lists or mappings of tensors (or of None), are equal to the last bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
