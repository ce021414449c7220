"""Whether fusing a call pays on a CPU: a call of few rows takes less time in PEFT's forward and backward."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from plora_kernels.counter_rng import HALF
from plora_kernels.dispatch import autocast_dtype

FEW = "few rows, for which it is faster on a CPU"

# What the fused form saves is passes over y and dX; what it costs is a Function of Python and, in half precision,
# rounding factors and a second product for their fp32 gradients, whatever the rows are. The two are even at about these
# numbers of elements of y, or of y and x where a backward follows. Measured layer by layer, K 576 and 768, N 576 to
# 3,072, 1 to 512 rows, with one thread of an AMD EPYC; float32, then half precision and anything compiled.
FEWEST_OF_FORWARD = 1 << 16, 1 << 17
FEWEST_OF_BOTH = 1 << 18, 1 << 20
# PEFT casts x to fp32 for fp32 factors, which fusing saves too.
FEWEST_OF_BOTH_WITH_CASTS = 1 << 18
# Elements of y and x below which a call is small in any case, and above which in none.
_ALWAYS, _NEVER = 1 << 15, FEWEST_OF_BOTH[True]


def is_small(layer: Any, x: Any) -> bool:
    """Say whether a call of a LoRA layer takes less time in PEFT's forward and backward.

    It is asked before anything else, and looks at no more than it must: for one row the question itself takes time.
    With a backend forced by PLORA_BACKEND no call is small.
    """
    if type(x) is not Tensor or not x.is_cpu:
        return False
    n, k = layer.out_features, layer.in_features
    rows = x.numel() // (k or 1)
    elements = rows * (n + k)
    if elements >= _NEVER or not elements:
        return False
    return (elements < _ALWAYS or _is_small(layer, x, rows)) and not _is_forced()


@torch.compiler.assume_constant_result  # a compiler cannot trace the environment
def _is_forced() -> bool:
    return "PLORA_BACKEND" in os.environ


def _is_small(layer: Any, x: Tensor, rows: int) -> bool:
    first = next(iter(layer._modules["lora_A"]._modules.values()), None)
    factor = None if first is None else first._parameters.get("weight")
    if factor is None:
        return False
    cast, n = autocast_dtype("cpu"), layer.out_features
    # A compiler fuses what PEFT does beside the products, so that as much is needed as in half precision.
    half = (x.dtype if cast is None else cast) in HALF or torch.compiler.is_compiling()
    if torch.is_grad_enabled() and (x.requires_grad or factor.requires_grad):
        casts = x.dtype in HALF and cast is None and factor.dtype is torch.float32 and not torch.compiler.is_compiling()
        fewest = FEWEST_OF_BOTH_WITH_CASTS if casts else FEWEST_OF_BOTH[half]
        return bool(rows * (n + layer.in_features) < fewest)
    return bool(rows * n < FEWEST_OF_FORWARD[half])
