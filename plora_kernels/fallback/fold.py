"""Folding in plain torch: it runs on CPU, and on other devices where the Triton kernels do not run.

fp32 and float64 weights take one `addmm`. Half-precision weights are summed in fp32, so that the sum is rounded once;
on CPU a few rows at a time, so that the fp32 values stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plora_kernels.counter_rng import HALF, element_bits, round_stochastically
from plora_kernels.fallback.linear import gather

# Elements of a half-precision W that are folded at a time on CPU: 512 KiB in fp32.
CHUNK_ELEMENTS = 1 << 17


def fold(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float, seed: int | None, out: Tensor
) -> None:
    """Write W + s·Σ_j b_j a_jᵀ to `out` (N, K), as `plora_kernels.kernels.fold.fold` does."""
    if weight.numel() == 0:
        return
    A, B = gather(lora_A, lora_B, index)
    if weight.dtype not in HALF:
        # Laid out as W is: a product that is written the other way round has other bits on some CPUs.
        total = out if out.stride() == weight.stride() else torch.empty_like(weight)
        torch.addmm(weight, B, A, alpha=scale, out=total)
        if total is not out:
            out.copy_(total)
        return
    A, B = A.float(), B.float()
    n, k = weight.shape
    rows = max(1, CHUNK_ELEMENTS // k) if weight.device.type == "cpu" else n
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        total = weight[part].float().addmm_(B[part], A, alpha=scale)  # (rows, K)
        if seed is not None:
            bits = element_bits(seed, first, total.shape[0], k, total.device)
            total = round_stochastically(total, bits, weight.dtype)
        out[part].copy_(total)
