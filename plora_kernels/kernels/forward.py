"""Forward of a PLoRA linear layer."""

from __future__ import annotations

from torch import Tensor

from .adapted_matmul import adapted_matmul, find_matmul_blocks
from .launch import Dropout
from .replay import empty, replayed


def layer_dropout(index: Tensor | None, frozen: bool, p: float, seed: Tensor | None) -> Dropout | None:
    """Return the dropout a layer's side branch has, or None where it touches nothing.

    Folded, every module that enters is selected; frozen, the index names those that are.
    """
    if seed is None or p == 0.0 or (index is not None and index.shape[0] == 0):
        return None
    return Dropout(p, seed, index if frozen else None)


@replayed
def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    scale: float,
    frozen: bool,
    keep_s: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, s)`: y (M, N) = x Wᵀ + bias + s·((D(x) Aᵀ) ⊙ m) Bᵀ and, if `keep_s`, s (M, places) = D(x) Aᵀ.

    Shapes: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R), bias (N,), index int32 or None for all modules. If
    `frozen`, all modules enter and the index names those that D, dropout, applies to.
    """
    applied = None if frozen else index
    main, down = weight.t(), lora_A.t()
    y, side = adapted_matmul(
        x,
        main,
        down,
        lora_B.t(),
        bias=bias,
        index=applied,
        drop_in=layer_dropout(index, frozen, dropout_p, dropout_seed),
        drop_out=None,
        scale=scale,
        side=None,
        keep_side=keep_s,
        blocks=find_matmul_blocks("forward", x, main, down.shape[1] if applied is None else applied.shape[0]),
    )
    return y, side if keep_s or side.numel() == 0 else empty((0,), x.dtype, x.device)
