"""Groups of a batch's samples: each group has its own modules in every adapted layer of a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from plora_kernels.checks import GroupSelections, check_group_factors, group_index, group_scales, group_seeds
from plora_kernels.dispatch import is_watched, refuse_transforms
from plora_kernels.errors import ConfigError, ShapeError
from plora_kernels.fallback import grouped_products
from plora_kernels.fallback.gradient_memory import GradientMemory
from plora_kernels.fallback.grouped_linear import equal_groups
from plora_kernels.fallback.grouped_products import GroupLayout, ProductPlan
from plora_kernels.functional import grouped_with_index
from plora_kernels.tile_tables import keep_tables


class RowGroups:
    """How a batch is divided: the samples of group g are `sizes[g]` consecutive ones along the leading axis.

    In a layer's x (samples, …, K) each sample has the same number of rows. All layers of a model share one object.

    >>> rows = RowGroups([2, 1])
    >>> len(rows), rows.bounds(torch.zeros(3, 5, 8))  # three samples of five rows
    (2, (0, 10, 15))
    """

    def __init__(
        self, sizes: Sequence[int], lengths: Sequence[int] | None = None, numbers: Tensor | None = None
    ) -> None:
        """Make C ≥ 1 groups of `sizes` samples each; a size may be 0.

        `lengths` is for texts that are padded to the longest of all groups: the length of each group's longest text.
        LoRA dropout then numbers a group's rows as if it were padded to that length only, so that its mask does not
        depend on the other groups. `numbers` (rows,) int64 are these numbers themselves, for batches that hold only
        some of a group's samples, or all of them in one sequence.

        Raises ConfigError for no groups, a negative size, or lengths that are not one for each group.
        """
        if not sizes or min(sizes) < 0:
            raise ConfigError(f"sizes is {list(sizes)}; one number of samples, 0 or more, is needed for each group")
        if lengths is not None and len(lengths) != len(sizes):
            raise ConfigError(f"lengths is {list(lengths)}; {len(sizes)} groups need one each")
        self.sizes, self.samples = tuple(sizes), sum(sizes)
        self._runs = equal_groups((0, *itertools.accumulate(sizes)))
        # A tensor, because torch.compile would recompile for every new list of lengths.
        self._numbers = numbers
        if numbers is None and lengths is not None and len(set(lengths)) > 1:
            self._numbers = _numbered(sizes, lengths)
        self._offsets: dict[tuple[int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def bounds(self, x: Tensor) -> tuple[int, ...]:
        """Return the groups' C+1 bounds among the rows of x (samples, …, K).

        Raises ShapeError where the rows are no multiple of the samples.
        """
        rows = math.prod(x.shape[:-1])
        if rows % self.samples if self.samples else rows:
            raise ShapeError(
                f"x is {tuple(x.shape)}, {rows} rows; groups of {list(self.sizes)} samples need a multiple of "
                f"{self.samples}"
            )
        each = rows // max(self.samples, 1)  # torch.compile cannot trace `divmod` of a dynamic number of rows
        return 0, *itertools.accumulate(size * each for size in self.sizes)

    def offsets(self, x: Tensor) -> Tensor:
        """Return `bounds` as a tensor (C+1,) int64 on x's device."""
        if torch.compiler.is_compiling():  # torch.compile would put guards on the contents of the dictionary
            return torch.tensor(self.bounds(x)).to(x.device, non_blocking=True)
        key = math.prod(x.shape[:-1]), x.device
        if key not in self._offsets:
            with torch.inference_mode(False):  # a later call may train, which forbids inference tensors
                self._offsets[key] = keep_tables(torch.tensor(self.bounds(x)).to(x.device, non_blocking=True))
        return self._offsets[key]

    def product(self, x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """Return y_g = x_g · weights_g + bias, (samples, …, N), for x (samples, …, K) and weights (C, K, N).

        `bias` is (N,), or (C, N) with one for each group, or None. Neighbouring groups of one size run as one batched
        product.
        """
        if len(self._runs) == 1:  # use the whole tensors, because the backward of a slice makes a copy
            return _batched(x, weights, bias, self.sizes[0])
        # Slices, not `split`: inductor recomputes slices in the backward. The parts that `split` returns it saves along
        # with the whole tensor, and then overwrites the whole tensor before the parts are read.
        parts = []
        for run in self._runs:
            samples = x.narrow(0, run.row, run.size * (run.last - run.first))
            shift = bias if bias is None or bias.dim() == 1 else run.among(bias)
            parts.append(_batched(samples, run.among(weights), shift, run.size))
        return torch.cat(parts)

    def numbers(self, x: Tensor) -> Tensor | None:
        """Return the row numbers of x (samples, L, K) for dropout, (samples · L,) int64; None counts from 0 a group."""
        if self._numbers is None or x.dim() != 3 or x.shape[0] * x.shape[1] != self._numbers.shape[0]:
            return None
        if torch.compiler.is_compiling():
            return self._numbers.to(x.device, non_blocking=True)
        with torch.inference_mode(False):  # as in `offsets`
            self._numbers = self._numbers.to(x.device, non_blocking=True)
        return self._numbers


def _numbered(sizes: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return the rows' numbers in their group, as if its samples were padded to the group's own length only."""
    with torch.inference_mode(False):
        places = torch.arange(max(lengths))
        parts = [torch.arange(size)[:, None] * own + places for size, own in zip(sizes, lengths, strict=True)]
        return torch.cat([part.flatten() for part in parts])


@dataclass(frozen=True)
class GroupModules:
    """The modules that C groups have in one layer: y_g = x_g Wᵀ + bias + s_g·((D(x_g) A_gᵀ) Bᵀ_g) for each group g.

    Make one by `of`. lora_A (C, R, K) and lora_B (C, N, R) are differentiable; `index` (C, W) int32 names the modules
    each group trains, None means all; the others enter y without a gradient.

    >>> A, B = torch.ones(2, 1, 3), torch.tensor([[[1.0]], [[10.0]]])
    >>> modules = GroupModules.of(RowGroups([1, 2]), A, B)
    >>> modules.linear(torch.ones(3, 3), torch.zeros(1, 3), None).flatten()
    tensor([ 3., 30., 30.])
    """

    rows: RowGroups
    lora_A: Tensor
    lora_B: Tensor
    index: Tensor | None
    scale: float
    scales: Tensor | None
    dropout_p: float = 0.0
    dropout_seeds: Tensor | None = field(default=None, repr=False)
    memory: GradientMemory | None = field(default=None, repr=False)
    _plans: dict[object, ProductPlan | None] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        rows: RowGroups,
        lora_A: Tensor,
        lora_B: Tensor,
        selected: GroupSelections | None = None,
        *,
        scale: float | Sequence[float] | Tensor = 1.0,
        dropout_p: float = 0.0,
        dropout_seeds: Sequence[int] | Tensor | None = None,
        gradients: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> GroupModules:
        """Return the modules of `len(rows)` groups; arguments are those of `plora_linear` with `groups`.

        `gradients` is memory of the factors' shapes and dtype for dA and dB (None for a factor that does not train).
        `group_gradients` fills it and must then be called in place of `backward`.

        Raises:
            ShapeError, RankError, SelectionError, DeviceError, ConfigError: an argument does not fit the groups.
        """
        groups, device = len(rows), lora_A.device
        if lora_A.dim() != 3 or lora_A.shape[0] != groups:
            raise ShapeError(f"lora_A is {tuple(lora_A.shape)}; {groups} groups need ({groups}, R, K)")
        with torch.inference_mode(False):
            index = group_index(selected, groups, lora_A.shape[1], device)
            common, scales = group_scales(scale, groups, device)
            seeds = group_seeds(dropout_p, dropout_seeds, groups, device)
        memory = None if gradients is None else GradientMemory(lora_A, lora_B, *gradients)
        return cls(rows, lora_A, lora_B, index, common, scales, float(dropout_p), seeds, memory)

    def with_seeds(self, seeds: Tensor) -> GroupModules:
        """Return the same with other dropout seeds, (C,) int64 on the device."""
        return replace(self, dropout_seeds=group_seeds(self.dropout_p, seeds, len(self.rows), self.lora_A.device))

    def without_dropout(self) -> GroupModules:
        """Return the same without dropout, as in evaluation."""
        return replace(self, dropout_p=0.0, dropout_seeds=None) if self.dropout_p else self

    def check(self, weight: Tensor) -> None:
        """Raise ShapeError or RankError unless the factors fit a layer's weight (N, K)."""
        check_group_factors(weight, self.lora_A, self.lora_B, len(self.rows))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y (…, N) for x (samples, …, K)."""
        factors = self.lora_A, self.lora_B
        if torch.compiler.is_compiling():
            if self._is_plain(x, weight, bias) and self.lora_A.dtype is x.dtype:
                return grouped_products.traced(x, weight, *factors, bias, self.scale, self.scales, self.rows.product)
        elif not is_watched(x):
            refuse_transforms(x, weight, *factors, bias)
            autocast, of_bias = torch.is_autocast_enabled(x.device.type), None if bias is None else bias.dtype
            key = x.shape, x.dtype, weight.dtype, of_bias, weight.requires_grad, autocast
            if key not in self._plans:
                with torch.inference_mode(False):  # a later call may train with the plan's tensors
                    self._plans[key] = self._plan(x, weight, bias)
            plan = self._plans[key]
            if plan is not None:
                return plan.apply(x, weight, *factors, bias)
        offsets, numbers = self.rows.offsets(x), self.rows.numbers(x) if self.dropout_p else None
        return grouped_with_index(
            x, weight, *factors, bias, self.index, offsets, self.scales, self.scale, True, self.dropout_p,
            self.dropout_seeds, numbers,
        )  # fmt: skip

    def _is_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Say whether plain torch products can compute y; for what does not fit the operator raises the error."""
        fits = x.shape[-1] == weight.shape[1] and math.prod(x.shape[:-1]) % max(self.rows.samples, 1) == 0
        fits = fits and (bias is None or bias.dtype is x.dtype)
        if not fits or weight.requires_grad or torch.is_autocast_enabled(x.device.type):
            return False
        return grouped_products.serves(x, weight, self.lora_A, self.lora_B, self.index, self.dropout_p)

    def _plan(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> ProductPlan | None:
        """Return the plan of plain torch products for y, or None if the operator has to run."""
        if not self._is_plain(x, weight, bias):
            return None
        layout = GroupLayout.of(self.rows.bounds(x), self.scale, self.scales, self.lora_A, self.memory)
        return ProductPlan.of(x, weight, self.lora_A.shape[1], layout, len(self.rows))


def group_gradients(
    loss: Tensor, groups: Mapping[str, GroupModules], others: Sequence[Tensor] = ()
) -> tuple[tuple[Tensor | None, ...], list[str]]:
    """Write the gradients of a loss by the groups' factors to the memory given for them; the host reads no tensor.

    Call it in place of `backward` for groups made with `gradients`. Small layers are differentiated by each group's own
    weight W_g = W + s_g·B_g A_g; from its gradient, dA_g = s_g·B_gᵀ dW_g and dB_g = s_g·dW_g A_gᵀ are computed once.

    Args:
        loss: a scalar made in one forward, by layers that used `groups`.
        groups: one for each layer, as `Injected.grouped` takes them.
        others: further tensors to differentiate by.

    Returns:
        The gradients by `others`, None for one the loss does not depend on, and the names of the layers whose factors
        the loss does not depend on: their memory holds zeros.

    Raises ConfigError if a layer's groups were made without `gradients`.

    >>> A, B = torch.ones(1, 1, 2, requires_grad=True), torch.ones(1, 1, 1, requires_grad=True)
    >>> d_A, d_B = torch.empty_like(A), torch.empty_like(B)
    >>> groups = GroupModules.of(RowGroups([1]), A, B, gradients=(d_A, d_B))
    >>> loss = groups.linear(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), None).sum()
    >>> group_gradients(loss, {"layer": groups})
    ((), [])
    >>> d_A, d_B
    (tensor([[[1., 3.]]]), tensor([[[4.]]]))
    """
    memories = {}
    for name, own in groups.items():
        if own.memory is None:
            raise ConfigError(f"the groups of layer {name} have no memory for gradients; make them with gradients=…")
        memories[name] = own.memory
    leaves = [memory.leaves() for memory in memories.values()]
    inputs = [*others, *itertools.chain.from_iterable(leaves)]
    found = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
    place, unused, copies = len(others), [], list[tuple[Tensor, Tensor]]()
    with torch.no_grad():
        for (name, memory), own_leaves in zip(memories.items(), leaves, strict=True):
            if not memory.collect(found[place : place + len(own_leaves)], copies):
                unused.append(name)
            place += len(own_leaves)
        if copies:  # on a GPU this takes one launch instead of two for every layer
            torch._foreach_copy_([own for own, _ in copies], [gradient for _, gradient in copies])
    return found[: len(others)], unused


def _batched(x: Tensor, weights: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """Return x_g · weights_g + bias for groups of `size` samples each."""
    count, _, width = weights.shape
    rows = x.reshape(count, -1, x.shape[-1]) if size else x.new_empty(count, 0, x.shape[-1])
    if bias is None:
        product = torch.bmm(rows, weights)
    else:
        product = torch.baddbmm(bias if bias.dim() == 1 else bias[:, None], rows, weights)
    return product.reshape(count * size, *x.shape[1:-1], width)
