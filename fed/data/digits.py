"""The embedded task: handwritten digits, unshifted for pretraining the base, shifted for clients and test."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fed.data.partition import Array

_MAX = 16.0  # largest grey level in scikit-learn's digits


def load_digits() -> tuple[Tensor, Array, tuple[str, ...]]:
    """Return 1,797 images (n, 1, 8, 8) fp32 with grey levels scaled to [-1, 1], labels (n,), and label names."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (2 / _MAX) - 1
    return images, digits.target.astype(np.int64), tuple(str(name) for name in digits.target_names)


def shift_images(images: Tensor, shift: Literal["rotate90", "rotate180", "invert", "none"]) -> Tensor:
    """Return shifted images (n, 1, H, W) with grey levels in [-1, 1]: rotated counter-clockwise, or inverted."""
    if shift == "invert":
        return -images
    return torch.rot90(images, {"none": 0, "rotate90": 1, "rotate180": 2}[shift], dims=(-2, -1))
