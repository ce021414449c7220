"""What a mixture's experts compute, on rows sorted by expert: two grouped products and the gate between them.

    y_t = Σ_j w_tj · f_e(x_t),  e = index_tj,        f_e(x) = gate(x U_eᵀ + u_e) D_eᵀ + d_e

U_e and D_e are the experts' weights with the modules of an adapter, W_e + s·B_e A_e, or without. Neither they nor the
updates s·B_e A_e are ever made: each expert's rows are multiplied by W_e, A_e and B_e (`plora_linear` with groups).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plora_kernels.dispatch import without_autocast
from plora_kernels.functional import grouped_product, grouped_with_index
from plora_kernels.tile_tables import keep_tables


class Stack(NamedTuple):
    """One projection of all experts: weight (E, N, K), any strides, bias (E, N) or None, and the modules if there are.

    lora_A (E, R, K) and lora_B (E, N, R) are both None where no adapter targets the weight.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scale: float = 1.0

    def of(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Return (S, N): rows (S, K) of expert e, offsets[e] … offsets[e+1]−1, times its weight with its modules."""
        weight, bias, lora_A, lora_B, scale = self
        # The caller has cast the rows as the unfused experts would, so autocast must not cast the weights.
        with without_autocast(rows.device.type):
            if lora_A is None or lora_B is None:
                return grouped_product(rows, weight, offsets, bias)
            return grouped_with_index(rows, weight, lora_A, lora_B, bias, None, offsets, None, scale, False)


class Routing(NamedTuple):
    """The order of rows by expert.

    Row i of the sorted rows is place order[i] of the routing table (T, k), flattened; place p is row inverse[p].
    offsets (E+1,) say which rows are each expert's. All are on the device, and the host reads none of them.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Routing:
        """Return the routing of an index (T, k) of experts 0 … E−1, by a stable sort."""
        ids, order = torch.sort(index.reshape(-1), stable=True)
        places = torch.arange(ids.shape[0], device=ids.device)
        inverse = torch.empty_like(order).scatter_(0, order, places)
        bounds = torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)
        return cls(order, inverse, _constant(torch.searchsorted(ids, bounds)))


def _constant(offsets: Tensor) -> Tensor:
    """Return offsets marked as constant, so that both projections and their backward share the kernels' tile tables."""
    return offsets if torch.compiler.is_compiling() else keep_tables(offsets)


class _Gathered(torch.autograd.Function):
    """rows[index], whose backward adds up the copies of a row in a fixed order; index_select's would use atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        placed = gradient.index_select(0, inverse)
        if ctx.copies > 1:
            # A sum over one axis adds up in fp32, whatever the dtype, and rounds once.
            placed = placed.unflatten(0, (placed.shape[0] // ctx.copies, ctx.copies)).sum(1)
        return placed, None, None, None


def _gathered(rows: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
    gathered: Tensor = _Gathered.apply(rows, index, inverse, copies)
    return gathered


def routed_experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Stack,
    down: Stack,
    gate: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Return y (T, H) in hidden's dtype for hidden (T, H), each token's k experts index (T, k) and weights (T, k).

    up (E, I', H) makes rows for `gate`, which returns what down (E, H, I) multiplies; `after` is applied to the result
    before the weights. An index E names no expert: it adds nothing. Differentiable in hidden, weights and the factors.
    The sum over a token's experts runs in the order of its index, in fp32.
    """
    experts, copies = up.weight.shape[0], index.shape[1]
    absent = index >= experts
    routing = Routing.of(index.clamp(max=experts - 1), experts)
    rows = _gathered(hidden.to(up.weight.dtype), routing.order // copies, routing.inverse, copies)  # (S, H)
    rows = down.of(gate(up.of(rows, routing.offsets)), routing.offsets)
    rows = rows if after is None else after(rows)
    placed = _gathered(rows, routing.inverse, routing.order, 1).unflatten(0, index.shape)  # (T, k, H)
    weighted = placed * weights.masked_fill(absent, 0.0).unsqueeze(-1)
    return weighted.sum(1).to(hidden.dtype)


def equally_fed_experts(hidden: Tensor, up: Stack, down: Stack, gate: Callable[[Tensor], Tensor]) -> Tensor:
    """Return f_e of every row of hidden (E·T, H), where expert e has rows e·T … (e+1)·T−1, in hidden's dtype."""
    experts = up.weight.shape[0]
    offsets = _constant(torch.arange(experts + 1, device=hidden.device) * (hidden.shape[0] // experts))
    return down.of(gate(up.of(hidden.to(up.weight.dtype), offsets)), offsets).to(hidden.dtype)
