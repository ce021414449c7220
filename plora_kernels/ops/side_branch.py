"""`plora::add_side_branch_`: a layer's side branch, added in place to an output that another library computed.

    y += s·((D(x) Aᵀ) ⊙ m) Bᵀ

It takes checked tensors and a selection as an index buffer. It has no derivative: the layer that calls it has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plora_kernels.backend import fallback_to_torch, runs_kernels
from plora_kernels.dispatch import is_watched
from plora_kernels.fallback import side_branch as fallback


def add_side_branch_(
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
    """Add to y (M, N) in place the modules' part for x (M, K); return S = D(x) Aᵀ (M, W or R), empty unless `keep_s`.

    lora_A (R, K) and lora_B (N, R) are in the dtype of x and y, or in float32 beside half precision. The index (W,)
    int32 names the selected modules, None all. If `frozen`, all modules enter y, and dropout applies to the selected.
    """
    arguments = y, x, lora_A, lora_B, index, scale, frozen, keep_s, dropout_p, dropout_seed
    if is_watched(y, x, lora_A, lora_B):
        s: Tensor = torch.ops.plora.add_side_branch_(*arguments)
        return s
    return _add(*arguments)


def _add(
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
    arguments = y, x, lora_A, lora_B, index, scale, frozen, keep_s, dropout_p, dropout_seed
    if runs_kernels(y):
        with fallback_to_torch("the side branch", y):
            from plora_kernels.kernels import side_branch as kernels

            return kernels.add_(*arguments)
    return fallback.add_(*arguments)


_operator = torch.library.custom_op("plora::add_side_branch_", _add, mutates_args=("y",))


@_operator.register_fake
def _fake(
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
    width = lora_A.shape[0] if frozen or index is None else index.shape[0]
    return x.new_empty((x.shape[0], width) if keep_s else (0,))
