"""Forward of a PLoRA linear layer in one launch."""

from __future__ import annotations

from torch import Tensor

from .adapted_matmul import adapted_matmul


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    scale: float,
    keep_s: bool,
) -> tuple[Tensor, Tensor]:
    """Return `(y, s)`: y (M, N) = x Wᵀ + bias + s·((x Aᵀ) ⊙ m) Bᵀ and, if `keep_s`, s (M, places) = x Aᵀ.

    Shapes: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R), bias (N,), index int32 or None for all modules.
    """
    return adapted_matmul(
        "forward", x, weight.t(), lora_A.t(), lora_B.t(), bias=bias, index=index, scale=scale, keep_side=keep_s
    )
