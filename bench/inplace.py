"""The adapter by in-place algebra: the library's matmul, then `addmm_` reads and writes the result once more.

It is the best a few calls of plain torch do, and what fused kernels have to beat besides PEFT.
"""

from typing import Any

import torch
from torch import Tensor


class InPlaceLinear(torch.autograd.Function):
    """y (M, N) = x Wᵀ + s·S Bᵀ with S = x Aᵀ (M, R); differentiable in x (M, K), A (R, K) and B (N, R)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        side = x @ A.t()
        ctx.save_for_backward(x, weight, A, B, side)
        ctx.scale = scale
        return (x @ weight.t()).addmm_(side, B.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx = dY W + s·dS A, dA = s·dSᵀ x and dB = s·dYᵀ S, with dS = dY B."""
        (grad_y,) = gradients
        x, weight, A, B, side = ctx.saved_tensors
        grad_side = (grad_y @ B).mul_(ctx.scale)
        grad_x = (grad_y @ weight).addmm_(grad_side, A)
        return grad_x, None, grad_side.t() @ x, (grad_y.t() @ side).mul_(ctx.scale), None
