"""The tensors of a small layer."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_inputs(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> tuple[Tensor, ...]:
    """Return x (3, 5, 7), weight (6, 7), lora_A (4, 7), lora_B (6, 4), bias (6,)."""
    x, weight, lora_A, lora_B, bias = (torch.randn(s, dtype=dtype) for s in ((3, 5, 7), (6, 7), (4, 7), (6, 4), (6,)))
    for tensor in (x, lora_A, lora_B, bias):
        tensor.requires_grad_(requires_grad)
    return x, weight, lora_A, lora_B, bias
