"""`plora::linear` as a torch operator: schema, autograd, choice of the backend.

    y = x Wᵀ + bias + s·((D(x) Aᵀ) ⊙ m) Bᵀ

It takes checked tensors and a selection as an index buffer; `plora_kernels.functional` checks them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plora_kernels.backend import fallback_to_torch, runs_kernels
from plora_kernels.dispatch import define, keeps_s, refuse_transforms
from plora_kernels.fallback import linear as fallback


def _places(lora_A: Tensor, index: Tensor | None, frozen: bool) -> int:
    """Return the number of columns of S: one per module, or one per entry of the index."""
    return lora_A.shape[0] if frozen or index is None else index.shape[0]


def _run_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return `(y, s)` of rows x (M, K) by the kernels or by torch."""
    if runs_kernels(x):
        with fallback_to_torch("the forward", x):
            from plora_kernels.kernels import linear as kernels

            return kernels.forward(x, *arguments)
    return fallback.forward(x, *arguments)


def _run_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB)` of rows dy (M, N) by the kernels or by torch."""
    if runs_kernels(dy):
        with fallback_to_torch("the backward", dy):
            from plora_kernels.kernels import linear as kernels

            d_x, d_lora_A, d_lora_B = kernels.backward(dy, *arguments)
            return d_x, d_lora_A, d_lora_B
    return fallback.backward(dy, *arguments)


_call = define("linear", "Tensor? index", "Tensor? dropout_seed", _run_forward, _run_backward, _places)


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    scale: float,
    frozen: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """Return y (…, N) of `plora::linear`, differentiable; S = D(x) Aᵀ is kept if the backward needs it for dB."""
    refuse_transforms(x, weight, lora_A, lora_B, bias)
    return _call(x, weight, lora_A, lora_B, bias, index, scale, frozen, keeps_s(lora_B), dropout_p, dropout_seed)
