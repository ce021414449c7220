"""The public function `plora_linear`: it checks and casts its arguments, then calls one operator.

No function here reads a device tensor on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from plora_kernels.checks import (
    GroupSelections,
    check_dropout,
    check_dropout_rows,
    check_factors,
    check_group_factors,
    check_number,
    check_operands,
    check_unselected,
    group_index,
    group_offsets,
    group_scales,
    group_seeds,
    index_for,
)
from plora_kernels.counter_rng import HALF
from plora_kernels.dispatch import autocast_dtype
from plora_kernels.errors import ConfigError, ShapeError, StateError
from plora_kernels.ops import grouped_linear, linear
from plora_kernels.selection import Selection


def plora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    selected: Selection | GroupSelections | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | Sequence[float] | Tensor = 1.0,
    unselected: str = "folded",
    dropout_p: float = 0.0,
    dropout_seed: int | Sequence[int] | Tensor | None = None,
    dropout_rows: Tensor | None = None,
    groups: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Return `y: (…, N)` = x Wᵀ + bias + s·((D(x) Aᵀ) ⊙ m) Bᵀ, differentiable in x, lora_A, lora_B and bias.

    D is LoRA dropout: element (row, feature) of x, flattened to (M, K), is dropped with probability dropout_p and
    otherwise multiplied by 1/(1−p). The mask is a function of the seed, so the backward recomputes it.

    Args:
        x: (…, K), any leading shape, contiguous or not, possibly empty.
        weight: (N, K), the frozen base; with groups also (C, N, K), any strides, one base a group, such as the experts
            of a mixture. With `unselected="folded"` the unselected modules were added to it before (`fold_`).
        lora_A: (R, K) down-projection; lora_B: (N, R) up-projection; 1 ≤ R ≤ 256.
        selected: which modules the caller trains. A bool tensor (R,) is a mask, integers are indices, `[]` selects
            none, None all. Host values are validated; a tensor on another device, or inside torch.compile, is never
            read by the host.
        bias: (N,) or None; beside a weight (C, N, K) also (C, N), one a group.
        scale: s, one number for all modules.
        unselected: "folded": unselected modules do not enter y (they sit in the weight). "frozen": they enter y and
            dx, and get no gradient.
        dropout_p: 0 ≤ p < 1. It touches selected modules only, in both forms.
        dropout_seed: an integer of 64 bits, or a tensor of one int64 on x's device, which the host never reads. The
            same seed gives the same mask on every device and backend. Needed where dropout_p is not 0.
        dropout_rows: with groups, the row number of each row of x in its group's mask, (M,) int64 on x's device, so
            that the real rows of a padded group can be dropped as without the padding; None counts each group's rows
            from 0.
        groups: offsets (C+1,) of C groups over the rows of x, flattened: group g has rows groups[g] … groups[g+1]−1,
            perhaps none. Then lora_A is (C, R, K) and lora_B (C, N, R), one adapter a group; selected is a mask (C, R)
            or C selections, scale one number or (C,), dropout_seed (C,), so that the result is that of C calls.
            With a weight (C, N, K) group g also has its own base weight[g], in y and in dx.
            Integers or a host tensor are validated; a tensor on x's device must rise from 0 to M: the kernels do not
            read it on the host, the torch path does.

    All tensors share one device and one dtype (float16, bfloat16, float32, float64), except that lora_A and lora_B may
    both be float32 beside half precision: they are rounded to x's dtype as they enter the products, y and dx have x's
    dtype, and dA and dB are the float32 sums, of which a CPU keeps 17 bits in bfloat16. Under torch.autocast all are
    cast as for `nn.Linear`, but float32 factors beside a weight of half precision stay as they are. Kernels accumulate
    in fp32 and round once. Gradients of unselected modules are zero.

    Raises:
        ShapeError, RankError, DTypeError, DeviceError, SelectionError, ConfigError: an argument does not fit.
        StateError: weight requires a gradient; the base is frozen.
        UnsupportedError: double backward; torch.func transforms; a forward-mode tangent; a batch of gradients
            (is_grads_batched) of a grouped call that runs on plain torch products.

    Source: arXiv 2602.16936.

    >>> x, weight = torch.ones(2, 3), torch.zeros(4, 3)
    >>> lora_A, lora_B = torch.ones(2, 3), torch.ones(4, 2)
    >>> plora_linear(x, weight, lora_A, lora_B, selected=[1], scale=0.5)[0]  # one module: 0.5 · 1 · (1+1+1)
    tensor([1.5000, 1.5000, 1.5000, 1.5000])
    >>> x, weight = torch.ones(3, 2), torch.zeros(1, 2)
    >>> lora_A, lora_B = torch.ones(2, 1, 2), torch.tensor([[[1.0]], [[10.0]]])
    >>> plora_linear(x, weight, lora_A, lora_B, groups=[0, 1, 3]).flatten()  # two adapters, for one row and for two
    tensor([ 2., 20., 20.])
    >>> own = torch.tensor([[[1.0, 1.0]], [[100.0, 100.0]]])  # (C, N, K): a base for each group
    >>> plora_linear(x, own, lora_A, lora_B, groups=[0, 1, 3]).flatten()
    tensor([  4., 220., 220.])
    """
    frozen = check_unselected(unselected) == "frozen"
    if groups is not None:
        offsets = group_offsets(groups, x.device)
        count = offsets.shape[0] - 1
        check_group_factors(weight, lora_A, lora_B, count)
        common, scales = group_scales(scale, count, x.device)
        index = group_index(cast(GroupSelections | None, selected), count, lora_A.shape[1], x.device)
        seeds = group_seeds(dropout_p, cast(Sequence[int] | Tensor | None, dropout_seed), count, x.device)
        return grouped_with_index(
            x, weight, lora_A, lora_B, bias, index, offsets, scales, common, frozen, float(dropout_p), seeds,
            dropout_rows,
        )  # fmt: skip
    if dropout_rows is not None:
        raise ConfigError("dropout_rows is given without groups; rows of one call count from 0")
    check_factors(weight, lora_A, lora_B)
    scale = check_number("scale", scale)
    index = index_for(cast(Selection | None, selected), lora_A.shape[0], x.device)
    seed = check_dropout(dropout_p, cast(int | Tensor | None, dropout_seed), x.device)
    return linear_with_index(x, weight, lora_A, lora_B, bias, index, scale, frozen, float(dropout_p), seed)


def linear_with_index(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    scale: float,
    frozen: bool,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Check x, bias, dtypes and devices, apply autocast and run the operator on an index buffer (None: all modules)."""
    x, weight, lora_A, lora_B, bias = _checked_and_cast(x, weight, lora_A, lora_B, bias)
    return linear.linear(x, weight, lora_A, lora_B, bias, index, scale, frozen, dropout_p, dropout_seed)


def grouped_with_index(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    offsets: Tensor,
    scales: Tensor | None,
    scale: float,
    frozen: bool,
    dropout_p: float = 0.0,
    dropout_seeds: Tensor | None = None,
    dropout_rows: Tensor | None = None,
) -> Tensor:
    """Do what `linear_with_index` does for groups of rows.

    Shapes: weight (N, K) and bias (N,), or weight (C, N, K) and bias (N,) or (C, N), index (C, W), offsets (C+1,),
    scales (C,), which multiply `scale`, or None, dropout_seeds (C,) int64, dropout_rows (M,) int64, the rows' numbers
    in their group's mask, or None to count them from 0. A caller that runs many layers on the same groups makes these
    tensors once, by the functions of `plora_kernels.checks`.
    """
    x, weight, lora_A, lora_B, bias = _checked_and_cast(x, weight, lora_A, lora_B, bias)
    check_dropout_rows(dropout_rows, math.prod(x.shape[:-1]), x.device)
    return grouped_linear.linear(
        x, weight, lora_A, lora_B, bias, index, offsets, scales, scale, frozen, dropout_p, dropout_seeds,
        dropout_rows,
    )  # fmt: skip


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `y: (…, N)` = x_g W_gᵀ + bias_g for the rows of every group g, differentiable in x and bias: no modules.

    Shapes: x (…, K), weight (C, N, K), any strides, bias (C, N), (N,) or None; offsets (C+1,) from `group_offsets`.
    Errors are those of `plora_linear` with groups.
    """
    groups, n, k = weight.shape
    # One module a group that is never read: the index names none. Two tensors, because a call is not replayed
    # (`kernels/replay.py`) if two arguments share an address.
    lora_A, lora_B = (weight.new_zeros(()).expand(groups, *sizes) for sizes in ((1, k), (n, 1)))
    index = torch.empty(groups, 0, dtype=torch.int32, device=x.device)
    return grouped_with_index(x, weight, lora_A, lora_B, bias, index, offsets, None, 1.0, False)


def _checked_and_cast(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tensors as autocast casts them; raise where x, bias, dtypes or devices do not fit the weight."""
    n, k = weight.shape[-2:]
    if x.dim() == 0 or x.shape[-1] != k:
        raise ShapeError(f"x is {tuple(x.shape)}; weight (N={n}, K={k}) needs (…, {k})")
    if bias is not None and tuple(bias.shape) != (n,):
        if tuple(bias.shape) != tuple(weight.shape[:-1]):
            also = f" or {tuple(weight.shape[:-1])}" if weight.dim() == 3 else ""
            raise ShapeError(f"bias is {tuple(bias.shape)}; weight (N={n}, K={k}) needs ({n},){also}")
    elif bias is not None and weight.dim() == 3:
        bias = bias.expand(weight.shape[0], n).contiguous()  # the operator takes a bias for each weight
    if weight.requires_grad and torch.is_grad_enabled():
        raise StateError("weight requires a gradient, but the base is frozen: call weight.requires_grad_(False)")
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        if not (weight.dtype in HALF and dtype in HALF and lora_A.dtype is lora_B.dtype is torch.float32):
            lora_A, lora_B = _autocast(lora_A, dtype), _autocast(lora_B, dtype)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = bias if bias is None else _autocast(bias, dtype)
    check_operands("x", {"x": x, "weight": weight, "bias": bias}, lora_A, lora_B)
    return x, weight, lora_A, lora_B, bias


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does for `nn.Linear`: float64 and integers stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype is not torch.float64 else tensor
