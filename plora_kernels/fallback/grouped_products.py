"""The grouped form in plain torch, with few calls, for groups that train every module and have no dropout.

    y_g = x_g W_gᵀ + bias + s_g·(x_g A_gᵀ) B_gᵀ        for the rows of every group g, W_g its own weight or one of all

Training many small adapters runs mostly this. With few rows, autograd's bookkeeping and extra passes over memory take
as long as the products. Therefore a product by factors is one node of the graph, the products apply the scales, and
gradients are written directly to the caller's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from plora_kernels.backend import runs_kernels
from plora_kernels.counter_rng import HALF
from plora_kernels.dispatch import as_rows, no_double_backward, shaped_as
from plora_kernels.fallback.grouped_linear import (
    EqualGroups,
    add_group_products_,
    base_gradient,
    base_product,
    bias_gradient,
    equal_groups,
    write_factor_gradient_,
)

THIN = 2  # on CPU a multiplication in a rank-R product takes so many times as long as one in a product with the weight
LARGEST = 2**18  # elements of the largest weight W_g that is made for each group
FEWEST_ROWS = 8  # with fewer rows a group, dB computed from dW_g is less exact than dB computed by itself
FEW_SUMS = 2**16  # so many elements of half precision, or fewer, are faster added to by one product over casts to fp32
CALLS = 5_000_000  # multiplications that take as long as the additional calls of rank-R products


class Memory(Protocol):
    """Memory for the gradients of a layer's stacked factors; `GradientMemory` implements it."""

    def place(self, which: int) -> Tensor:
        """Return memory for a gradient of A (0) or B (1)."""

    def weights(self, weight: Tensor, layout: GroupLayout) -> list[Tensor]:
        """Return the groups' own weights W_g as leaves of the graph."""


class GroupLayout(NamedTuple):
    """What does not depend on the values of x: the runs of groups, the scales, and the memory for gradients.

    The scale of group g is s_g = scale·scales[g]; scales are (C, 1, 1) in the factors' dtype, or None for s_g = scale.
    """

    runs: tuple[EqualGroups, ...]
    scale: float
    scales: Tensor | None
    memory: Memory | None

    @classmethod
    def of(
        cls, bounds: tuple[int, ...], scale: float, scales: Tensor | None, like: Tensor,
        memory: Memory | None = None,
    ) -> GroupLayout:  # fmt: skip
        """Return the layout of groups with C+1 bounds; scales (C,) or None get the dtype and device of `like`."""
        own = None if scales is None else scales.to(like)[:, None, None]
        return cls(equal_groups(bounds), scale, own, memory)

    def gradient(self, which: int, factor: Tensor) -> Tensor:
        """Return memory for the gradient of A (0) or B (1)."""
        return torch.empty_like(factor) if self.memory is None else self.memory.place(which)

    def bias_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """Return the sum of dy's rows (N,), or of each group's (C, N) if the weight is (C, N, K)."""
        return dy.sum(0) if weight.dim() == 2 else bias_gradient(dy, self.runs)

    def scaled(self, groups: Tensor, run: EqualGroups) -> Tensor:
        """Return `groups`, a tensor of the groups of a run, times scales[g], but not times `scale`."""
        return groups if self.scales is None else groups * own_part(self.scales, run)


def supports(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Say whether this file's products may take these operands, whose shapes fit, and no kernels run.

    They take one dtype of at least fp32, or fp32 factors beside half precision. Factors of half precision are excluded,
    whose gradients the operator rounds.
    """
    alike = x.dtype is weight.dtype and lora_A.dtype is lora_B.dtype
    wide = lora_A.dtype is torch.float32 if x.dtype in HALF else lora_A.dtype is x.dtype and x.dtype.itemsize >= 4
    return alike and wide and not runs_kernels(x)


def serves(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, dropout_p: float) -> bool:
    """Say whether `supports` holds, all modules train and there is no dropout."""
    return index is None and not dropout_p and supports(x, weight, lora_A, lora_B)


def group_weights_are_cheaper(rows: int, groups: int, weight: Tensor, rank: int) -> bool:
    """Say whether W_g + s·B_g A_g, made for each group and call, costs less than rank-R products: never for own W_g.

    For m rows a group, forward and backward need in addition to the base products m·3R(N+K) multiplications by rank-R
    products, or m·NK + 4·NKR by W_g and its gradient. On CPU products of rank R run at half the speed of the others.
    """
    if weight.dim() == 3:
        return False
    n, k = weight.shape
    if rows < FEWEST_ROWS * groups or n * k > LARGEST:
        return False
    return rows * n * k + groups * 4 * n * k * rank <= THIN * rows * 3 * rank * (n + k) + CALLS


class ProductPlan(NamedTuple):
    """How plain products compute one layer at one shape of x: by the groups' own weights, or by their factors."""

    layout: GroupLayout
    by_weights: bool

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, rank: int, layout: GroupLayout, groups: int) -> ProductPlan:
        """Return the faster of the two plans for x (…, K) of `groups` groups with `rank` modules each.

        In half precision W_g would lose small updates to rounding.
        """
        half = x.dtype in HALF
        return cls(layout, not half and group_weights_are_cheaper(math.prod(x.shape[:-1]), groups, weight, rank))

    def apply(self, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
        """Return y (…, N) for x (…, K), weight (N, K), lora_A (C, R, K), lora_B (C, N, R), bias (N,) or None."""
        if not self.by_weights:
            return by_factors(x, weight, lora_A, lora_B, bias, self.layout)
        memory = self.layout.memory
        if memory is not None and torch.is_grad_enabled():
            weights = memory.weights(weight, self.layout)
        else:
            weights = own_weights(weight, lora_A, lora_B, self.layout)
        return by_weights(x, weights, bias, self.layout)


def traced(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: float,
    scales: Tensor | None,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Return y (samples, …, N) by plain operations that torch.compile can trace.

    `product(x, weights, bias)` is the product of each group's rows with its own weights: `RowGroups.product`.
    """
    # No `alpha`: when inductor fuses a product with an addition, it ignores alpha (pytorch issue 167313).
    scaled = lora_B * scale
    if scales is not None:
        scaled = scaled * scales.to(scaled.dtype)[:, None, None]
    if group_weights_are_cheaper(math.prod(x.shape[:-1]), lora_A.shape[0], weight, lora_A.shape[1]):
        return product(x, torch.baddbmm(weight, scaled, lora_A).mT, bias)
    low = product(product(x, lora_A.mT, None), scaled.mT, None)
    return functional.linear(x, weight, bias) + low


def by_factors(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, layout: GroupLayout
) -> Tensor:
    """Return y (…, N) by the base product over all rows and rank-R products for each run, as one autograd node."""
    product = _ByFactors if lora_A.dtype is x.dtype else _ByRoundedFactors
    y: Tensor = product.apply(x, weight, lora_A, lora_B, bias, layout)
    return y


def own_weights(weight: Tensor, lora_A: Tensor, lora_B: Tensor, layout: GroupLayout) -> list[Tensor]:
    """Return W_g = W + s_g·B_g A_g, one tensor per run of c groups: (c, N, K), or (N, K) for a single group."""
    scaled = lora_B if layout.scales is None else lora_B * layout.scales
    return [
        (torch.addmm if run.is_alone else torch.baddbmm)(
            weight, own_part(scaled, run), own_part(lora_A, run), alpha=layout.scale
        )
        for run in layout.runs
    ]


def by_weights(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, layout: GroupLayout) -> Tensor:
    """Return y (…, N) by the groups' own weights, as `own_weights` returns them: for small layers."""
    if layout.runs[0].is_alone and layout.runs[0].whole:
        return functional.linear(x, weights[0], bias)
    rows, parts = as_rows(x), []
    for run, own in zip(layout.runs, weights, strict=True):
        part = _part(rows, run)
        if run.is_alone:
            parts.append(functional.linear(part, own, bias))
            continue
        product = torch.bmm(part, own.mT) if bias is None else torch.baddbmm(bias, part, own.mT)
        parts.append(product.flatten(0, 1))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(*x.shape[:-1], y.shape[1])


class _ByFactors(torch.autograd.Function):
    """The base product over all rows, plus rank-R products for each run of groups."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, layout: GroupLayout
    ) -> Tensor:
        rows = as_rows(x)
        y = base_product(rows, weight, bias, layout.runs)
        s = rows.new_empty(rows.shape[0], lora_A.shape[1])  # (M, R)
        for run in layout.runs:
            part = _part(s, run)
            add_product_(part, _part(rows, run), own_part(lora_A, run).mT, beta=0)
            add_product_(_part(y, run), layout.scaled(part, run), own_part(lora_B, run).mT, alpha=layout.scale)
        ctx.save_for_backward(x, weight, lora_A, lora_B, s)
        ctx.layout = layout
        return shaped_as(x, y)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, s = ctx.saved_tensors
        need_x, _, need_A, need_B, need_bias, _ = ctx.needs_input_grad
        layout, dy_rows, rows = ctx.layout, as_rows(dy), as_rows(x)
        d_x = base_gradient(dy_rows, weight, layout.runs) if need_x else None
        d_A = layout.gradient(0, lora_A) if need_A else None
        d_B = layout.gradient(1, lora_B) if need_B else None
        ds = torch.empty_like(s)  # (M, R)
        for run in layout.runs:
            part, dy_part = _part(ds, run), _part(dy_rows, run)
            if need_x or need_A:
                add_product_(part, dy_part, own_part(lora_B, run), beta=0)
            if d_x is not None:
                add_product_(_part(d_x, run), layout.scaled(part, run), own_part(lora_A, run), alpha=layout.scale)
            if d_A is not None:
                add_product_(own_part(d_A, run), part.mT, _part(rows, run), beta=0, alpha=layout.scale)
            if d_B is not None:
                add_product_(own_part(d_B, run), dy_part.mT, _part(s, run), beta=0, alpha=layout.scale)
        for gradient in (d_A, d_B):
            if gradient is not None and layout.scales is not None:
                gradient.mul_(layout.scales)
        d_bias = layout.bias_gradient(dy_rows, weight) if need_bias else None
        return None if d_x is None else d_x.view(x.shape), None, d_A, d_B, d_bias, None


class _ByRoundedFactors(torch.autograd.Function):
    """The same for fp32 factors beside half precision: rounded once a call, with gradients that are sums in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, layout: GroupLayout
    ) -> Tensor:
        rows, A = as_rows(x), lora_A.to(x.dtype)
        B = (lora_B if layout.scales is None else lora_B * layout.scales).to(x.dtype)
        y = base_product(rows, weight, bias, layout.runs)
        s = rows.new_empty(rows.shape[0], A.shape[1])  # (M, R)
        for run in layout.runs:
            part = run.of(s)
            torch.bmm(run.of(rows), run.among(A).mT, out=part)
            _add_rounded_product_(run.of(y), part, run.among(B).mT, layout.scale)
        ctx.save_for_backward(x, weight, lora_A, lora_B, A, B, s)
        ctx.layout = layout
        return shaped_as(x, y)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, A, B, s = ctx.saved_tensors
        need_x, _, need_A, need_B, need_bias, _ = ctx.needs_input_grad
        layout, dy_rows, rows = ctx.layout, as_rows(dy), as_rows(x)
        d_x = base_gradient(dy_rows, weight, layout.runs) if need_x else None
        d_A = layout.gradient(0, lora_A) if need_A else None
        d_B = layout.gradient(1, lora_B) if need_B else None
        ds = torch.empty_like(s)  # (M, R), times the groups' own scales
        for run in layout.runs:
            part, dy_part = run.of(ds), run.of(dy_rows)
            if need_x or need_A:
                torch.bmm(dy_part, run.among(B), out=part)
            if d_x is not None:
                _add_rounded_product_(run.of(d_x), part, run.among(A), layout.scale)
            if d_A is not None:
                write_factor_gradient_(run.among(d_A), part, run.of(rows), layout.scale)
            if d_B is not None:
                # (Sᵀ dY)ᵀ runs faster than dYᵀ S in the CPU's matmul, because the long axis stays contiguous.
                turned = d_B.new_empty(run.last - run.first, s.shape[1], dy_rows.shape[1])
                write_factor_gradient_(turned, run.of(s), dy_part, layout.scale)
                run.among(d_B).copy_(turned.mT)
        if d_B is not None and layout.scales is not None:
            d_B.mul_(layout.scales)
        d_bias = layout.bias_gradient(dy_rows, weight) if need_bias else None
        return None if d_x is None else d_x.view(x.shape), None, d_A, d_B, d_bias, None


def _add_rounded_product_(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add s · left · right to `out` (c, m, D) of half precision, batched and in place, rounded once."""
    if out.numel() <= FEW_SUMS:
        out.copy_(out.float().baddbmm_(left.float(), right.float(), alpha=scale))
    else:
        add_group_products_(out, left, right, scale)


def _part(rows: Tensor, run: EqualGroups) -> Tensor:
    """Return the rows of a run's groups: (c, m, D) for batched products, or (m, D) of a single group for plain ones."""
    if not run.is_alone:
        return run.of(rows)
    return rows if run.whole else rows.narrow(0, run.row, run.size)


def own_part(groups: Tensor, run: EqualGroups) -> Tensor:
    """Return a run's part of (C, …), without the leading axis for a single group."""
    return groups[run.first] if run.is_alone else run.among(groups)


def add_product_(out: Tensor, left: Tensor, right: Tensor, beta: int = 1, alpha: float = 1.0) -> None:
    """Set `out` to beta·out + alpha·left·right in place; with beta 0 its old values are not read."""
    add = out.addmm_ if out.dim() == 2 else out.baddbmm_
    add(left, right, beta=beta, alpha=alpha)
