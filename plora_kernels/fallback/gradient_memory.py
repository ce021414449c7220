"""Training groups of rows: gradients are written to the caller's memory, small layers are differentiated by W_g.

The backward of a small layer spends more time in the overhead of calls than in products. Autograd therefore computes
only dW_g, the gradient of each group's own weight W_g = W + s_g·B_g A_g, which is a leaf of the graph. The factors'
gradients are computed from it afterwards: dA_g = s_g·B_gᵀ dW_g and dB_g = s_g·dW_g A_gᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plora_kernels.errors import ConfigError, DeviceError, DTypeError, ShapeError
from plora_kernels.fallback.grouped_linear import EqualGroups
from plora_kernels.fallback.grouped_products import GroupLayout, add_product_, own_part


class GradientMemory:
    """Memory for the gradients of one layer's stacked factors, and the groups' own weights W_g during a pass.

    A pass is one forward of the model and the `collect` after it. In it the layer may run any number of times.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, d_A: Tensor | None, d_B: Tensor | None) -> None:
        """Take memory for dA (C, R, K) and dB (C, N, R); None for a factor that does not train.

        Raises ShapeError, DTypeError or DeviceError if the memory differs from its factor, and ConfigError if a factor
        that requires a gradient has none.
        """
        self._factors = lora_A, lora_B
        self._gradients = d_A, d_B
        for name, factor, own in zip("AB", self._factors, self._gradients, strict=True):
            _check_fits(name, factor, own)
        self._written = [False, False]
        self._cuts: dict[tuple[EqualGroups, ...], list[_GroupWeights]] = {}
        self._made: dict[tuple[EqualGroups, ...], list[_GroupWeights]] = {}  # computed in this pass
        self._made_of: tuple[int, ...] = ()

    def leaves(self) -> list[Tensor]:
        """Return the tensors to differentiate a loss by: the factors that train, and the W_g made in this pass."""
        factors = [factor for factor in self._factors if factor.requires_grad]
        return factors + [cut.leaf for cuts in self._made.values() for cut in cuts]

    def place(self, which: int) -> Tensor:
        """Return memory for a gradient of A (0) or B (1).

        The first call in a pass returns the caller's memory, later calls new memory, whose content autograd adds.
        """
        own = self._gradients[which]
        if own is None or self._written[which]:
            return torch.empty_like(self._factors[which])
        self._written[which] = True
        return own

    def weights(self, weight: Tensor, layout: GroupLayout) -> list[Tensor]:
        """Return the groups' own weights as leaves, whose gradients `collect` takes; computed once for a pass."""
        state = tuple(tensor._version for tensor in (weight, *self._factors))
        if state != self._made_of:  # the weight or a factor was changed in place since
            self._made.clear()
            self._made_of = state
        if layout.runs not in self._cuts:
            self._cuts[layout.runs] = [
                _GroupWeights(run, weight, self._factors, self._gradients, layout) for run in layout.runs
            ]
        cuts = self._cuts[layout.runs]
        if layout.runs not in self._made:
            with torch.no_grad():
                for cut in cuts:
                    cut.make(weight)
            self._made[layout.runs] = cuts
        return [cut.leaf for cut in cuts]

    def collect(self, gradients: Sequence[Tensor | None], copies: list[tuple[Tensor, Tensor]]) -> bool:
        """Write dA and dB to their memory, given the gradients of `leaves`; say whether there were any.

        Gradients that the caller still has to copy are added to `copies` as (target, source).
        """
        left, begun = list(gradients), [False, False]
        for which, (factor, own) in enumerate(zip(self._factors, self._gradients, strict=True)):
            if factor.requires_grad and own is not None:
                gradient = left.pop(0)
                begun[which] = gradient is not None
                if gradient is None or gradient.data_ptr() == own.data_ptr():
                    continue
                if self._made:
                    own.copy_(gradient)
                else:
                    copies.append((own, gradient))
        for cuts in self._made.values():
            parts = [left.pop(0) for _ in cuts]
            if all(part is None for part in parts):
                continue
            for cut, part in zip(cuts, parts, strict=True):
                cut.take_apart(torch.zeros_like(cut.leaf) if part is None else part, add=begun)
            begun = [True, True]
        for own, has in zip(self._gradients, begun, strict=True):
            if own is not None and not has:
                own.zero_()
        self._written[:] = False, False
        self._made.clear()
        return any(begun)


class _GroupWeights:
    """The factors, gradient memory, scales and own weights W_g of one run of c groups of equal size.

    These are views (c, …), or (…) if the run is a single group. They are made once, because making views takes long
    beside the products of a small layer.
    """

    def __init__(
        self, run: EqualGroups, weight: Tensor, factors: Sequence[Tensor], gradients: Sequence[Tensor | None],
        layout: GroupLayout,
    ) -> None:  # fmt: skip
        """Slice a layer's factors, gradient memory and scales for one run; allocate the weights without values."""
        self._A, self._B = (own_part(factor.detach(), run) for factor in factors)
        self._A_t, self._B_t = self._A.mT, self._B.mT
        self._gradients = [None if gradient is None else own_part(gradient, run) for gradient in gradients]
        self._scale, self._scales = layout.scale, None if layout.scales is None else own_part(layout.scales, run)
        self._own = weight.new_empty(*self._A.shape[:-2], *weight.shape)
        self.leaf = self._own.detach().requires_grad_()

    def make(self, weight: Tensor) -> None:
        """Compute the weights W_g = W + s_g·B_g A_g, (c, N, K)."""
        up = self._B if self._scales is None else self._B * self._scales
        product = torch.addmm if self._own.dim() == 2 else torch.baddbmm
        product(weight, up, self._A, alpha=self._scale, out=self._own)

    def take_apart(self, gradient: Tensor, add: Sequence[bool]) -> None:
        """Write dA_g = s_g·B_gᵀ dW_g and dB_g = s_g·dW_g A_gᵀ for dW_g (c, N, K), or add them where `add` is set."""
        (d_A, d_B), (add_A, add_B) = self._gradients, add
        if self._scales is not None:
            gradient = gradient * self._scales
        if d_A is not None:
            add_product_(d_A, self._B_t, gradient, int(add_A), self._scale)
        if d_B is not None:
            add_product_(d_B, gradient, self._A_t, int(add_B), self._scale)


def _check_fits(name: str, factor: Tensor, own: Tensor | None) -> None:
    if own is None:
        if factor.requires_grad:
            raise ConfigError(f"lora_{name} requires a gradient, but there is no memory for it")
    elif own.shape != factor.shape:
        raise ShapeError(f"the memory for d{name} is {tuple(own.shape)}; lora_{name} is {tuple(factor.shape)}")
    elif own.dtype is not factor.dtype:
        raise DTypeError(f"the memory for d{name} is {own.dtype}; lora_{name} is {factor.dtype}")
    elif own.device != factor.device:
        raise DeviceError(f"the memory for d{name} is on {own.device}; lora_{name} is on {factor.device}")
