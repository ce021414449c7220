"""The mathematics in plain torch, one function per equation: the reference that tests compare with.

Every function works in the dtype it is given, float64 included, and never changes its inputs.
Source: Zhang, Hu, Xu, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation",
ICLR 2026, arXiv 2602.16936.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plora_kernels.errors import ConfigError, ShapeError
from plora_kernels.selection import host_indices


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    unselected: str = "folded",
    dropout: Tensor | None = None,
) -> Tensor:
    """Return `y: (…, N)` = x Wᵀ + bias + s·((D(x) Aᵀ) ⊙ m) Bᵀ.

    Shapes: x (…, K), weight (N, K), lora_A (R, K), lora_B (N, R), mask bool (R,) or None for all, bias (N,).
    D(x) = x ⊙ dropout, whose elements are 0 or 1/(1−p), shaped as x; None leaves x alone. With `unselected="frozen"`
    every module is summed; the mask then says which of them see D(x), the others see x.
    """
    s = _side_product(x, lora_A, mask, unselected, dropout)  # (…, R)
    if mask is not None and unselected == "folded":
        s = torch.where(mask, s, torch.zeros_like(s))
    y = x @ weight.T + scale * (s @ lora_B.T)
    return y if bias is None else y + bias


def _side_product(x: Tensor, lora_A: Tensor, mask: Tensor | None, unselected: str, dropout: Tensor | None) -> Tensor:
    """Return S (…, R) = D(x) Aᵀ, or x Aᵀ for modules that are frozen and not selected."""
    if dropout is None:
        return x @ lora_A.T
    s = (x * dropout) @ lora_A.T
    return torch.where(mask, s, x @ lora_A.T) if mask is not None and unselected == "frozen" else s


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    unselected: str = "folded",
    dropout: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB, dbias)` of `forward` for the output gradient dy (…, N).

    dx = dY W + s((dY B) ⊙ m) A ⊙ dropout when folded; frozen, the others' s((dY B) ⊙ ¬m) A is added: (…, K);
    dA = s((dY B) ⊙ m)ᵀ D(x): (R, K);  dB = s dYᵀ((D(x) Aᵀ) ⊙ m): (N, R);  dbias = Σ_rows dY: (N,).
    The rows of dA and columns of dB of unselected modules are zero in both forms.
    """
    dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    ds = dy_rows @ lora_B  # (M, R)
    dropped = x_rows if dropout is None else x_rows * dropout.reshape(x_rows.shape)
    s = dropped @ lora_A.T  # (M, R)
    zero = torch.zeros((), dtype=dy.dtype, device=dy.device)
    ds_selected = ds if mask is None else torch.where(mask, ds, zero)
    s_selected = s if mask is None else torch.where(mask, s, zero)
    low = scale * (ds_selected @ lora_A)
    dx = dy_rows @ weight + (low if dropout is None else low * dropout.reshape(x_rows.shape))
    if unselected == "frozen" and mask is not None:
        dx = dx + scale * (torch.where(mask, zero, ds) @ lora_A)
    d_lora_A = scale * (ds_selected.T @ dropped)
    d_lora_B = scale * (dy_rows.T @ s_selected)
    return dx.reshape(x.shape), d_lora_A, d_lora_B, dy_rows.sum(0)


def fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor, *, scale: float = 1.0, sign: int = 1) -> Tensor:
    """Return `W_i: (N, K)` = W + sign·s·Σ_{j: m_j = 0} b_j a_jᵀ, the unselected modules added to the weight."""
    rest = ~mask
    return weight + sign * scale * (lora_B[:, rest] @ lora_A[rest])


def module_average(
    previous: tuple[Tensor, Tensor],
    updates: Sequence[tuple[Tensor, Tensor, Sequence[int] | Tensor]],
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Average one matrix's modules over the clients that trained them.

    a_j ← Σ_{i∈Q_j} w_i a_ij / Σ_{i∈Q_j} w_i and the same for b_j, where Q_j are the updates that hold module j;
    a module that is in no update keeps its previous value, bit for bit.

    Args:
        previous: the server's (A (R, K), B (N, R)).
        updates: per client (A_i (r_i, K), B_i (N, r_i), indices (r_i,)): row t of A_i is module indices[t].
        weights: one positive number per update; None weighs them equally. They need not sum to one.

    Returns:
        (A, B) in the dtype of `previous`; sums run in float64 in the order of `updates`.

    Raises:
        ShapeError: an update's shapes do not fit `previous` or its indices.
        SelectionError: an index is out of range or repeated. ConfigError: a weight is not a positive number.

    >>> server = torch.zeros(2, 1), torch.zeros(1, 2)
    >>> one = torch.tensor([[2.0]]), torch.tensor([[4.0]]), [0]  # trained module 0
    >>> both = torch.tensor([[6.0], [1.0]]), torch.tensor([[8.0, 1.0]]), [0, 1]
    >>> module_average(server, [one, both])
    (tensor([[4.],
            [1.]]), tensor([[6., 1.]]))
    """
    lora_A, lora_B = previous
    share = [1.0] * len(updates) if weights is None else [float(w) for w in weights]
    if len(share) != len(updates):
        raise ShapeError(f"{len(share)} weights for {len(updates)} updates; one per update is needed")
    for position, w in enumerate(share):
        if not 0 < w < math.inf:
            raise ConfigError(f"weight {position} is {w}; a positive finite number is needed")
    sum_A = torch.zeros(lora_A.shape, dtype=torch.float64, device=lora_A.device)
    sum_B = torch.zeros(lora_B.shape, dtype=torch.float64, device=lora_B.device)
    total = torch.zeros(lora_A.shape[0], dtype=torch.float64, device=lora_A.device)
    for position, ((A_i, B_i, indices), w) in enumerate(zip(updates, share, strict=True)):
        host_indices(indices, lora_A.shape[0])  # raises for indices out of range or repeated
        index = torch.as_tensor(indices, dtype=torch.long, device=lora_A.device)
        wanted_A, wanted_B = (len(index), lora_A.shape[1]), (lora_B.shape[0], len(index))
        if tuple(A_i.shape) != wanted_A or tuple(B_i.shape) != wanted_B:
            raise ShapeError(
                f"update {position} holds A {tuple(A_i.shape)} and B {tuple(B_i.shape)}; its {len(index)} indices "
                f"need {wanted_A} and {wanted_B}"
            )
        sum_A.index_add_(0, index, A_i.to(lora_A.device, torch.float64) * w)
        sum_B.index_add_(1, index, B_i.to(lora_A.device, torch.float64) * w)
        total.index_add_(0, index, torch.full((len(index),), w, dtype=torch.float64, device=lora_A.device))
    seen = total > 0
    divisor = torch.where(seen, total, torch.ones_like(total))
    mean_A = torch.where(seen[:, None], (sum_A / divisor[:, None]).to(lora_A.dtype), lora_A)
    mean_B = torch.where(seen, (sum_B / divisor).to(lora_B.dtype), lora_B)
    return mean_A, mean_B
