"""Adapted linears that share one input: computed in one call, and one dX for all of them.

    y_p = x W_pᵀ + bias_p + s_p (x A_pᵀ) B_pᵀ             for every projection p
    dX  = Σ_p (dY_p W_p + s_p dS_p A_p),  dS_p = dY_p B_p

One call computes all forwards, but every projection gets its own node in autograd's graph, as if it had run alone:
outputs may be differentiated together or one by one, in any order. In the backward each node computes its own dA and dB
and records its part of dX. The node that the engine runs last computes the sum of the parts. The kernels make one
launch for all projections, or one for each where that is faster (`are_joined` of `kernels/projections_forward.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plora_kernels.backend import fallback_to_torch, runs_kernels
from plora_kernels.dispatch import as_rows, is_recorded, shaped_as, without_autocast
from plora_kernels.fallback import projections as fallback


class Projection(NamedTuple):
    """One projection's operands: weight (N, K), lora_A (R, K), lora_B (N, R), bias (N,) or None, s, and the selection.

    All R modules enter y and dX. `trained` is an index buffer of those that get a gradient, or None if all do.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scale: float
    trained: Tensor | None


class Computed(NamedTuple):
    """One projection's results: y (M, N) and S = x Aᵀ (M, R), which has no elements if gradients are disabled."""

    y: Tensor
    s: Tensor


class _Part(NamedTuple):
    """What one projection adds to dX: dY W + s·dS A, with dy (M, N), weight (N, K), ds (M, R), lora_A (R, K)."""

    dy: Tensor
    weight: Tensor
    ds: Tensor
    lora_A: Tensor
    scale: float


@torch.no_grad()
def forward(x: Tensor, projections: Sequence[Projection], keep_s: bool) -> list[Computed]:
    """Return y and S of every projection of x (…, K), without a graph."""
    *operands, _ = zip(*projections, strict=True)
    ys, ss = _run_forward(as_rows(x), *operands, keep_s)
    return [Computed(y, s) for y, s in zip(ys, ss, strict=True)]


def _run_forward(x: Tensor, *arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return y and S of every projection of rows x (M, K) by the kernels or by torch."""
    if runs_kernels(x):
        with fallback_to_torch("joint projections", x):
            from plora_kernels.kernels import projections_forward as kernels

            return kernels.forward(x, *arguments)
    return fallback.forward(x, *arguments)


def _input_gradient(parts: Sequence[_Part]) -> Tensor:
    """Return dX (M, K), the sum of the parts, by the kernels or added up in place by torch."""
    if runs_kernels(parts[0].dy):
        with fallback_to_torch("the joint input gradient", parts[0].dy):
            from plora_kernels.kernels import projections_backward as kernels

            return kernels.input_gradient(*zip(*parts, strict=True))
    return fallback.input_gradient(*zip(*parts, strict=True))


def _factor_gradients(
    dy: Tensor, x: Tensor, s: Tensor, operands: Projection, need_A: bool, need_B: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dS (M, R) = dY B, dA (R, K) = s·dSᵀ x and dB (N, R) = s·dYᵀ S of one projection; None if not needed."""
    _, lora_A, lora_B, _, scale, index = operands
    if runs_kernels(dy):
        with fallback_to_torch("the factor gradients", dy):
            from plora_kernels.kernels import projections_backward as kernels

            return kernels.factor_gradients(dy, x, s, lora_A, lora_B, index, scale, need_A, need_B)
    return fallback.factor_gradients(dy, x, s, lora_A, lora_B, index, scale, need_A, need_B)


@dataclass
class _Gathering:
    """The parts of dX that are recorded so far in one run of the backward engine, and the nodes that have run."""

    arrived: set[int] = field(default_factory=set)
    parts: list[_Part] = field(default_factory=list)


class JointGradient:
    """dX of the projections of one input: each node's backward adds its part, and the last one returns the sum.

    Autograd adds the gradients that the nodes return for x, so any one of them may return the sum. Which node is last
    is known only in the backward, by asking the engine which nodes it will still run. Nodes are held by weak
    references. Parts are kept by the engine run they belong to, so repeated, nested or aborted backwards do not mix.
    """

    def __init__(self, shape: torch.Size) -> None:
        """Take the shape of x, (…, K), which is that of dX."""
        self._shape = shape
        self._nodes: list[weakref.ref[Any]] = []
        self._gatherings: dict[int, _Gathering] = {}

    def join(self, node: Any) -> int:
        """Add a projection's node and return its number."""
        self._nodes.append(weakref.ref(node))
        return len(self._nodes) - 1

    def add(self, node: Any, part: _Part | None) -> Tensor | None:
        """Add a node's part of dX (None: it has none); return dX (…, K) if no other node will run, else None."""
        run = torch._C._current_graph_task_id()
        gathering = self._gatherings.setdefault(run, _Gathering())
        gathering.arrived.add(node.number)
        if part is not None:
            gathering.parts.append(part)
        edge = node.next_functions[0]  # the graph edge that dX flows along
        for number, reference in enumerate(self._nodes):
            other = reference()
            if other is None or number in gathering.arrived or other.next_functions[0] != edge:
                continue
            if torch._C._will_engine_execute_node(other):
                return None
        del self._gatherings[run]
        if not gathering.parts:
            return None
        with without_autocast(gathering.parts[0].dy.device.type):
            return _input_gradient(gathering.parts).view(self._shape)


class _Attach(torch.autograd.Function):
    """Autograd node of a projection whose y and S are already computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        scale: float,
        computed: Computed,
        joint: JointGradient,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, lora_A, lora_B, computed.s, index)  # the same tensors as `plora::linear` saves
        ctx.scale, ctx.joint, ctx.number = scale, joint, joint.join(ctx)
        return computed.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        d_x = d_lora_A = d_lora_B = d_bias = part = None
        need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        if dy is not None:
            x, weight, lora_A, lora_B, s, index = ctx.saved_tensors
            if is_recorded(dy):
                # Under create_graph=True the operator enters the graph, so that a double backward raises its own error.
                needs = (need_x, need_A, need_B, need_bias)
                results = torch.ops.plora.linear_backward(
                    dy, x, weight, lora_A, lora_B, s, index, ctx.scale, index is not None, *needs, 0.0, None
                )
                d_x, d_lora_A, d_lora_B, d_bias = (g if need else None for g, need in zip(results, needs, strict=True))
            else:
                dy_rows, x_rows = as_rows(dy), as_rows(x)
                operands = Projection(weight, lora_A, lora_B, None, ctx.scale, index)
                with without_autocast(dy.device.type):
                    ds, d_lora_A, d_lora_B = _factor_gradients(dy_rows, x_rows, s, operands, need_A, need_B)
                d_bias = dy_rows.sum(0) if need_bias else None
                part = _Part(dy_rows, weight, ds, lora_A, ctx.scale)
        if need_x:
            others = ctx.joint.add(ctx, part)
            d_x = others if d_x is None else d_x if others is None else d_x + others
        return d_x, None, d_lora_A, d_lora_B, d_bias, None, None, None, None


def attach(x: Tensor, operands: Projection, computed: Computed, joint: JointGradient) -> Tensor:
    """Return y (…, N) of x (…, K) as `forward` computed it, differentiable in x, lora_A, lora_B and bias."""
    weight, lora_A, lora_B, bias, scale, index = operands
    computed = Computed(shaped_as(x, computed.y), computed.s)
    if not torch.is_grad_enabled():
        return computed.y
    return _Attach.apply(x, weight, lora_A, lora_B, bias, index, scale, computed, joint)
