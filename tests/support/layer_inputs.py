"""The tensors of a small layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GROUPS = [0, 6, 6, 15]  # of x's rows


def layer_inputs(
    dtype: torch.dtype = torch.float32, requires_grad: bool = True, groups: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """Return x (3, 5, 7), weight (6, 7), lora_A (4, 7), lora_B (6, 4), bias (6,); with groups, A and B for each."""
    several = () if groups is None else (len(groups) - 1,)
    shapes = ((3, 5, 7), (6, 7), (*several, 4, 7), (*several, 6, 4), (6,))
    x, weight, lora_A, lora_B, bias = (torch.randn(shape, dtype=dtype) for shape in shapes)
    for tensor in (x, lora_A, lora_B, bias):
        tensor.requires_grad_(requires_grad)
    return x, weight, lora_A, lora_B, bias
