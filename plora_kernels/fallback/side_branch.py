"""A layer's side branch in plain torch, added in place to an output: one rank-R product (`addmm_`) besides S."""

from __future__ import annotations

from torch import Tensor

from plora_kernels.fallback.linear import entering, side_of_input


def add_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    index: Tensor | None,
    scale: float,
    frozen: bool,
    keep_s: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """Do what `plora_kernels.kernels.side_branch.add_` does: add to y (M, N) in place, return S or no elements."""
    A, B = entering(lora_A, lora_B, None if frozen else index, x.dtype)
    s = side_of_input(x, A, index, frozen, dropout_p, dropout_seed)
    if A.shape[0]:
        y.addmm_(s, B.t(), alpha=scale)
    return s if keep_s else x.new_empty(0)
