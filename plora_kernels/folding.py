"""Folding modules into a weight: the public function `fold_` and its torch operator.

Nothing here reads a device tensor on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_path
from .backend import runs_kernels
from .checks import check_alike, check_factors, check_number, index_for
from .errors import ConfigError, StateError
from .selection import Selection


def fold_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    selected: Selection | None,
    *,
    scale: float = 1.0,
    sign: int = 1,
) -> Tensor:
    """Add the unselected modules to the weight in place, W += sign·s·Σ_{j∉selected} b_j a_jᵀ, and return it.

    Args:
        weight: (N, K), changed in place; lora_A (R, K), lora_B (N, R) of the same dtype and device.
        selected: the modules to leave out: a bool mask (R,), indices, `[]` to fold all, None (all selected) to fold
            none.
        scale: s. sign: +1 folds, −1 takes out again (to rounding: keep the original where it must be exact).

    The sum runs in fp32 (float64 for float64) and is rounded once into the weight. It has no autograd: the factors
    enter as constants.

    Raises:
        ShapeError, RankError, DTypeError, DeviceError, SelectionError: an argument does not fit.
        ConfigError: sign is neither 1 nor −1.
        StateError: weight requires a gradient and gradients are enabled.

    Source: Select-N-Fold, arXiv 2602.16936.
    """
    if sign not in (1, -1):
        raise ConfigError(f"sign is {sign!r}; 1 folds and -1 takes out again")
    check_factors(weight, lora_A, lora_B)
    check_alike("weight", {"weight": weight, "lora_A": lora_A, "lora_B": lora_B})
    if weight.requires_grad and torch.is_grad_enabled():
        raise StateError("weight requires a gradient: fold inside torch.no_grad() or call weight.requires_grad_(False)")
    scale = check_number("scale", scale)
    if selected is None:
        return weight
    index = index_for(selected, lora_A.shape[0], weight.device, invert=True)
    torch.ops.plora.fold_(weight.detach(), lora_A.detach(), lora_B.detach(), index, scale * sign)
    return weight


@torch.library.custom_op("plora::fold_", mutates_args=("weight",))
def _fold_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float) -> None:
    if runs_kernels(weight):
        from .kernels import fold

        fold.fold_(weight, lora_A, lora_B, index, scale)
    else:
        torch_path.fold_(weight, lora_A, lora_B, index, scale)


@_fold_.register_fake
def _fold_fake(weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float) -> None:
    return None
