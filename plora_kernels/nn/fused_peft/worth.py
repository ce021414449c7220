"""Whether fusing a call pays on a CPU: a call of few rows takes less time in PEFT's forward and backward."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from plora_kernels.counter_rng import HALF
from plora_kernels.dispatch import autocast_dtype

# What the fused form saves is passes over y and dX; what it costs is a Function of Python and, in half precision,
# rounding factors and a second product for their fp32 gradients, whatever the rows are. The two are even at about these
# numbers of elements of y, or of y and x where a backward follows. Measured layer by layer, K 576 and 768, N 576 to
# 3,072, 1 to 512 rows, with one thread of an AMD EPYC; float32, then half precision.
FEWEST_OF_FORWARD = 1 << 16, 1 << 17
FEWEST_OF_BOTH = 1 << 18, 1 << 20
# PEFT casts x to fp32 for fp32 factors, which fusing saves too.
FEWEST_OF_BOTH_WITH_CASTS = 1 << 18


def why_not_worth(x: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
    """Return why a call takes less time in PEFT's forward, or None; `factors` are those that enter it.

    With a backend forced by PLORA_BACKEND every call that can be fused is, and so it is inside torch.compile.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or "PLORA_BACKEND" in os.environ:
        return None
    (n, k), rows = weight.shape, x.shape[:-1].numel()
    cast = autocast_dtype("cpu")
    half = (x.dtype if cast is None else cast) in HALF
    if torch.is_grad_enabled() and (x.requires_grad or any(factor.requires_grad for factor in factors)):
        casts = half and cast is None and factors[0].dtype is torch.float32
        few = rows * (n + k) < (FEWEST_OF_BOTH_WITH_CASTS if casts else FEWEST_OF_BOTH[half])
    else:
        few = rows * n < FEWEST_OF_FORWARD[half]
    return "few rows, for which it is faster on a CPU" if few else None
