"""`FusedPLoRALinear`: a linear layer with R parallel one-rank modules, in place of `nn.Linear`."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from plora_kernels.checks import check_dropout, check_factors, check_positive, check_probability
from plora_kernels.folding import fold
from plora_kernels.functional import linear_with_index, plora_linear
from plora_kernels.nn.adapter_dtype import adapter_dtype_for, beside
from plora_kernels.nn.distributed import gathered, refuse_unreduced
from plora_kernels.nn.folded_weight import check_original
from plora_kernels.nn.replaceable import check_replaceable
from plora_kernels.nn.row_groups import GroupModules
from plora_kernels.nn.selected_modules import SelectedModules
from plora_kernels.selection import check_rank


def adapter_scale(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """Return s: α/R, or α/√R when rank-stabilised (Kalajdzievski, 2023, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


class FusedPLoRALinear(SelectedModules):
    """Compute y = x Wᵀ + bias + s·Σ_j b_j a_jᵀ x over R one-rank modules, of which a client may train a few.

    Parameters: `weight` (N, K) and `bias` (N,), frozen; `lora_A` (R, K) and `lora_B` (N, R), trainable, in the
    weight's dtype or, by default, in float32 beside half precision (`adapter_dtype`). After `select` the trainable
    parameters are the compact (r, K) and (N, r) of the selected modules alone, so an optimiser built then cannot change
    the others (`select` says when they stay the same objects). The others are added to the weight ("folded") or summed
    without a gradient ("frozen"). `state_dict` always holds weight, bias, lora_A and lora_B in full, the weight
    unfolded.

    Folding keeps a copy of the original weight, on its device or in host memory (`original`), and always starts from
    it, so `unfold` restores the base bit for bit, however often modules were selected. With "device" the original
    keeps its memory, and the parameter, still the same object, uses new memory while modules are folded into it.

    With `dropout` > 0, every call in training mode drops elements of x for the selected modules. The seed is drawn from
    torch's generator, unless `dropout_seed` (an int, or one int64 on the device) is set.

    Source: arXiv 2602.16936.

    >>> layer = FusedPLoRALinear(8, 4, rank=3)
    >>> layer.select([0, 2])
    >>> layer(torch.ones(5, 8)).shape, layer.lora_A.shape
    (torch.Size([5, 4]), torch.Size([2, 8]))
    >>> layer.unfold()
    >>> layer.lora_A.shape
    torch.Size([3, 8])
    """

    bias: nn.Parameter | None
    dropout_seed: int | Tensor | None
    groups: GroupModules | None = None  # set inside `Injected.grouped`
    disabled: bool = False  # set inside `Injected.disable`
    check_base = staticmethod(check_replaceable)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        original: str = "device",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | str = "auto",
    ) -> None:
        """Make a layer whose base weight and bias, of `dtype`, are initialised like those of `nn.Linear`."""
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        super().__init__()
        self._adapt(base, rank, alpha, rank_stabilized, dropout, original, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 16,
        alpha: float = 32.0,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        original: str = "device",
        adapter_dtype: torch.dtype | str = "auto",
    ) -> FusedPLoRALinear:
        """Return a layer that shares the linear's weight and bias (and freezes them) and adds R modules.

        At first the layer computes the same as the linear: A is Kaiming-uniform and B zero, as in PEFT.

        Args:
            linear: an `nn.Linear`, not a subclass of it.
            rank: R, 1–256. alpha: α; the scale is α/R, or α/√R if `rank_stabilized`.
            dropout: p of LoRA dropout, applied in training mode to the x of selected modules.
            original: where the original of a folded weight is kept, "device" or "host".
            adapter_dtype: the factors' dtype: a torch dtype, its name, or "auto": float32 over a weight of half
                precision, as in PEFT, else the weight's.

        Raises:
            TargetError: not a plain nn.Linear. RankError, ConfigError: an argument cannot be used.
            DTypeError: the weight takes no factors of `adapter_dtype`.
        """
        cls.check_base(linear, "from_linear got")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(linear, rank, alpha, rank_stabilized, dropout, original, adapter_dtype)
        layer.train(linear.training)
        return layer

    def _adapt(
        self, base: nn.Linear, rank: int, alpha: float, rank_stabilized: bool, dropout: float, original: str,
        adapter_dtype: torch.dtype | str,
    ) -> None:  # fmt: skip
        dropout = check_probability("dropout", dropout)
        alpha = check_positive("alpha", alpha)
        check_original(original)
        factors = self._take_base(base, adapter_dtype)
        self.rank, self.alpha, self.rank_stabilized = check_rank(rank), alpha, bool(rank_stabilized)
        self.scale = adapter_scale(self.rank, alpha, rank_stabilized)
        self.dropout, self.dropout_seed = dropout, None
        self.in_features, self.out_features = base.in_features, base.out_features
        self.requires_grad_(False)  # freezes the base; the factors do not exist yet
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(self.rank, self.in_features, dtype=factors, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.rank, dtype=factors, device=device))
        self._start_unselected()
        self._keep_originals(original)
        self.reset_adapter()

    def give_base(self, linear: nn.Linear) -> nn.Linear:
        """Return the linear that the layer was made of, with the weight and bias that the layer has now."""
        # Moving the model or loading a state dict may have replaced the parameters.
        linear.weight, linear.bias = self.weight, cast(nn.Parameter, self.bias)
        return linear

    def _take_base(self, base: nn.Linear, adapter_dtype: torch.dtype | str) -> torch.dtype:
        """Take the base's weight and bias, and return the dtype of the factors beside them."""
        factors = adapter_dtype_for(adapter_dtype, base.weight.dtype)
        self.weight, self.bias = cast(nn.Parameter, base.weight), cast(nn.Parameter | None, base.bias)
        return factors

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draw A Kaiming-uniform (a = √5) and set B to zero, as PEFT initialises an adapter."""
        self.refuse_selection("reset the adapter")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, N) for x (…, K); inside `Injected.grouped` every group of samples uses its own modules."""
        if self.disabled:
            return self._base(x)
        if self.groups is not None:
            groups = self.groups if self.training else self.groups.without_dropout()
            return groups.linear(x, self.weight, self.bias)
        if not torch.compiler.is_compiling():
            refuse_unreduced(self.lora_A, self.lora_B)
        self._refuse_divided_selection()
        frozen = self._unselected == "frozen"
        if self.lora_A.shape[0] == 0 and self.full_A is not None and self.full_B is not None and not frozen:
            # All modules are folded into the weight, so the call selects none of them.
            return plora_linear(x, self.weight, self.full_A, self.full_B, [], bias=self.bias, scale=self.scale)
        lora_A, lora_B = self._merged_factors() if frozen else (self.lora_A, self.lora_B)
        # nn.DataParallel copies parameters to each device, but not the index.
        index = self.selected_index.to(x.device) if frozen and self.selected_index is not None else None
        check_factors(self.weight, lora_A, lora_B)
        p, seed = self._dropout(x.device)
        return linear_with_index(x, self.weight, lora_A, lora_B, self.bias, index, self.scale, frozen, p, seed)

    def _base(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias (…, N) as the base's `nn.Linear` computes it, W being the original of a folded weight."""
        original = self._original()
        # One that is kept in host memory comes for this call alone; the weight in use is not written to, because a
        # graph made outside may still need it.
        weight = self.weight if original is None else original.to(self.weight)
        return functional.linear(x, weight, self.bias)

    def check_groups(self, groups: GroupModules) -> None:
        """Raise ShapeError or RankError unless the groups' factors fit the layer."""
        groups.check(self.weight)

    def _dropout(self, device: torch.device) -> tuple[float, Tensor | None]:
        """Return the probability and seed of this call's dropout, (0, None) in evaluation."""
        if self.dropout == 0.0 or not self.training:
            return 0.0, None
        if self.dropout_seed is not None:
            return self.dropout, check_dropout(self.dropout, self.dropout_seed, device)
        # Drawn from torch's generator of the device: torch.manual_seed makes it reproducible, activation checkpointing
        # draws the same seed again, and every replay of a CUDA graph gets a new mask.
        return self.dropout, torch.randint(-(2**63), 2**63 - 1, (1,), device=device)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return W + s·B A (N, K) over all modules in new memory; the layer is not changed."""
        original = self._original()
        weight = gathered((self.weight if original is None else original).detach().to(self.weight.device))
        lora_A, lora_B = (beside(weight, factor) for factor in self.factors())
        return fold(weight, lora_A, lora_B, selected=[], scale=self.scale)

    def take_merged(self, weight: Tensor, own: bool) -> None:
        """Take a merged weight (N, K): in memory of the present parameter, or in one of its `own` if that is tied."""
        if own:
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self._give_memory(weight)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Return a new `nn.Linear` with weight W + s·B A over all modules; the layer is not changed."""
        weight = self.merged_weight()
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(gathered(self.bias.detach()).clone(), requires_grad=False)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes, the rank and the selection as text, for `repr`."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, scale={self.scale:g}"
        )
        if self._selected is not None:
            text += f", selected={list(self._selected)}, unselected={self._unselected!r}"
        return text
