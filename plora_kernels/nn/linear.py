"""`FusedPLoRALinear`: a linear layer with R parallel one-rank modules, in place of `nn.Linear`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from plora_kernels.checks import check_dropout, check_factors, check_positive, check_probability, check_unselected
from plora_kernels.errors import ShapeError, StateError
from plora_kernels.folding import Fold, fold, fold_many_
from plora_kernels.functional import linear_with_index, plora_linear
from plora_kernels.nn.folded_weight import FoldedWeight, check_original
from plora_kernels.nn.replaceable import check_replaceable
from plora_kernels.nn.row_groups import GroupModules
from plora_kernels.selection import Selection, check_rank, complement, host_indices, index_buffer


def adapter_scale(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """Return s: α/R, or α/√R when rank-stabilised (Kalajdzievski, 2023, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


class FusedPLoRALinear(FoldedWeight):
    """Compute y = x Wᵀ + bias + s·Σ_j b_j a_jᵀ x over R one-rank modules, of which a client may train a few.

    Parameters: `weight` (N, K) and `bias` (N,), frozen; `lora_A` (R, K) and `lora_B` (N, R), trainable, all in one
    dtype. After `select` the trainable parameters are the compact (r, K) and (N, r) of the selected modules alone, so
    an optimiser built then cannot change the others. The others are added to the weight ("folded") or summed without a
    gradient ("frozen"). `state_dict` always holds weight, bias, lora_A and lora_B in full, the weight unfolded.

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
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    full_A: Tensor | None
    full_B: Tensor | None
    selected_index: Tensor | None
    dropout_seed: int | Tensor | None
    groups: GroupModules | None = None  # set inside `Injected.grouped`

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
    ) -> None:
        """Make a layer whose base weight and bias are initialised like those of `nn.Linear`."""
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        super().__init__()
        self._adapt(base, rank, alpha, rank_stabilized, dropout, original)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 16,
        alpha: float = 32.0,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        original: str = "device",
    ) -> FusedPLoRALinear:
        """Return a layer that shares the linear's weight and bias (and freezes them) and adds R modules.

        At first the layer computes the same as the linear: A is Kaiming-uniform and B zero, as in PEFT.

        Args:
            linear: an `nn.Linear`, not a subclass of it.
            rank: R, 1–256. alpha: α; the scale is α/R, or α/√R if `rank_stabilized`.
            dropout: p of LoRA dropout, applied in training mode to the x of selected modules.
            original: where the original of a folded weight is kept, "device" or "host".

        Raises:
            TargetError: not a plain nn.Linear. RankError, ConfigError: an argument cannot be used.
        """
        check_replaceable(linear, "from_linear got")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(linear, rank, alpha, rank_stabilized, dropout, original)
        layer.train(linear.training)
        return layer

    def _adapt(
        self, base: nn.Linear, rank: int, alpha: float, rank_stabilized: bool, dropout: float, original: str
    ) -> None:
        dropout = check_probability("dropout", dropout)
        alpha = check_positive("alpha", alpha)
        check_original(original)
        self.rank, self.alpha, self.rank_stabilized = check_rank(rank), alpha, bool(rank_stabilized)
        self.scale = adapter_scale(self.rank, alpha, rank_stabilized)
        self.dropout, self.dropout_seed = dropout, None
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = cast(nn.Parameter, base.weight), cast(nn.Parameter | None, base.bias)
        self.requires_grad_(False)  # freezes the base; the factors do not exist yet
        self.lora_A = nn.Parameter(base.weight.new_empty(self.rank, self.in_features))
        self.lora_B = nn.Parameter(base.weight.new_empty(self.out_features, self.rank))
        self.weight_is_tied = False
        self._selected: tuple[int, ...] | None = None
        self._unselected = "folded"
        # Set while modules are selected; never saved.
        for name in ("full_A", "full_B", "selected_index"):
            self.register_buffer(name, None, persistent=False)
        self._keep_originals(original)
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draw A Kaiming-uniform (a = √5) and set B to zero, as PEFT initialises an adapter."""
        self.refuse_selection("reset the adapter")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, N) for x (…, K); inside `Injected.grouped` every group of samples uses its own modules."""
        if self.groups is not None:
            groups = self.groups if self.training else self.groups.without_dropout()
            return groups.linear(x, self.weight, self.bias)
        frozen = self._unselected == "frozen"
        if self.lora_A.shape[0] == 0 and self.full_A is not None and self.full_B is not None and not frozen:
            # All modules are folded into the weight, so the call selects none of them.
            return plora_linear(x, self.weight, self.full_A, self.full_B, [], bias=self.bias, scale=self.scale)
        lora_A, lora_B = self._merged_factors() if frozen else (self.lora_A, self.lora_B)
        index = self.selected_index if frozen else None
        check_factors(self.weight, lora_A, lora_B)
        p, seed = self._dropout(x.device)
        return linear_with_index(x, self.weight, lora_A, lora_B, self.bias, index, self.scale, frozen, p, seed)

    def _dropout(self, device: torch.device) -> tuple[float, Tensor | None]:
        """Return the probability and seed of this call's dropout, (0, None) in evaluation."""
        if self.dropout == 0.0 or not self.training:
            return 0.0, None
        if self.dropout_seed is not None:
            return self.dropout, check_dropout(self.dropout, self.dropout_seed, device)
        # Drawn from torch's generator of the device: torch.manual_seed makes it reproducible, activation checkpointing
        # draws the same seed again, and every replay of a CUDA graph gets a new mask.
        return self.dropout, torch.randint(-(2**63), 2**63 - 1, (1,), device=device)

    def _merged_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (R, K) and B (N, R) with the compact parameters at their modules, differentiable in those."""
        if self.full_A is None or self.full_B is None or self.selected_index is None:
            return self.lora_A, self.lora_B
        places = self.selected_index[: self.lora_A.shape[0]].long()
        # A caller may have cast the trained parameters, for instance to fp32 over a bf16 base.
        lora_A, lora_B = self.lora_A.to(self.full_A.dtype), self.lora_B.to(self.full_B.dtype)
        return self.full_A.index_copy(0, places, lora_A), self.full_B.index_copy(1, places, lora_B)

    # ----------------------------------------------------------------------------------------------- selection

    @property
    def selected(self) -> tuple[int, ...] | None:
        """The selected modules, sorted, or None without a selection (all R are trained)."""
        return self._selected

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, indices_or_mask: Selection, unselected: str = "folded") -> None:
        """Train these modules alone: Select-N-Fold. An earlier selection is undone first.

        `lora_A` and `lora_B` become new parameters, (r, K) and (N, r), in the order of the module numbers: build the
        optimiser after selecting.

        Args:
            indices_or_mask: host indices, or a bool mask (R,); `[]` selects none.
            unselected: "folded" adds the other modules to the weight (the original is kept); "frozen" leaves the
                weight as it is and sums them without a gradient.

        Raises:
            SelectionError, ShapeError, ConfigError: the selection or `unselected` is not valid.
            StateError: the weight cannot be folded: it is trainable, shared with another module, or was changed.
        """
        indices = host_indices(indices_or_mask, self.rank)
        self.check_selectable(unselected)
        select_in_all([self], [indices], unselected)

    def check_selectable(self, unselected: str) -> None:
        """Raise the ConfigError or StateError that `select` with this `unselected` would raise; change nothing."""
        check_unselected(unselected)
        self.check_unfoldable()
        if unselected == "frozen":
            return
        if self.weight.requires_grad:
            raise StateError("weight requires a gradient and cannot be folded: call weight.requires_grad_(False)")
        if self.weight_is_tied:
            raise StateError("weight is shared with another module and cannot be folded: use unselected='frozen'")

    def check_unfoldable(self) -> None:
        """Raise StateError if other code changed the weight while modules were folded into it, as `unfold` does."""
        if not self._weight_is_as_folded():
            raise StateError(
                "weight was changed while modules were folded into it: unfold(discard_changes=True) gives back the "
                "original without the change"
            )

    def _fold_of_others(self, indices: tuple[int, ...]) -> Fold | None:
        """Keep the original and return the fold of all modules except `indices`, or None if that leaves none."""
        if not complement(indices, self.rank):
            return None
        dtype = self.weight.dtype
        lora_A, lora_B = self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype)
        weight, out = self._keep_original()
        return Fold(weight, lora_A, lora_B, indices, self.scale, out=out)

    def _hold(self, indices: tuple[int, ...], unselected: str, folded: Tensor | None) -> None:
        """Make a selection current; `folded` is the weight with the other modules folded in (None: none are)."""
        full_A, full_B = self.lora_A.data, self.lora_B.data
        index = index_buffer(indices, full_A.device)
        places = index[: len(indices)].long()
        lora_A, lora_B = nn.Parameter(full_A.index_select(0, places)), nn.Parameter(full_B.index_select(1, places))
        if folded is not None:
            self._take_folded(folded)
        self.full_A, self.full_B, self.selected_index = full_A, full_B, index
        self.lora_A, self.lora_B = lora_A, lora_B
        self._selected, self._unselected = indices, unselected

    @torch.inference_mode(False)
    @torch.no_grad()
    def unfold(self, *, discard_changes: bool = False) -> None:
        """Undo the selection: `lora_A` and `lora_B` hold all R modules again, the weight is the original bit for bit.

        Without a selection it does nothing. If the weight's `.data` was replaced while modules were folded, the
        original is restored without an error, because that change cannot be detected.

        Args:
            discard_changes: restore the original even if other code changed the weight while modules were folded in.

        Raises:
            StateError: the weight was changed while it was folded, and `discard_changes` is not set.
        """
        if self._selected is None:
            return
        if not discard_changes:
            self.check_unfoldable()
        lora_A, lora_B = self.factors()
        self._drop_original()
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.full_A = self.full_B = self.selected_index = None
        self._selected, self._unselected = None, "folded"

    def _folded_anew(self, weight: Tensor) -> Tensor | None:
        if self._selected is None or self.full_A is None or self.full_B is None:
            return None
        factors = self.full_A.to(weight.dtype), self.full_B.to(weight.dtype)
        return fold(weight, *factors, self._selected, scale=self.scale)

    def refuse_selection(self, action: str) -> None:
        """Raise StateError if modules are selected; `action` names in the message what cannot be done then."""
        if self._selected is not None:
            raise StateError(f"cannot {action} while modules {list(self._selected)} are selected; call unfold() first")

    # ------------------------------------------------------------------------------------------ factors, merging

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return copies of A (R, K) and B (N, R), trained modules included."""
        lora_A, lora_B = self._merged_factors()
        return lora_A.detach().clone(), lora_B.detach().clone()

    @torch.no_grad()
    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Copy A (R, K) and B (N, R) into the layer.

        Raises:
            StateError: modules are selected. ShapeError: the shapes differ from the layer's.
        """
        self.refuse_selection("set the factors")
        for name, parameter, value in (("lora_A", self.lora_A, lora_A), ("lora_B", self.lora_B, lora_B)):
            _check_same_shape(name, parameter, value)
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Return a new `nn.Linear` with weight W + s·B A over all modules; the layer is not changed."""
        original = self._original()
        weight = (self.weight if original is None else original).detach().to(self.weight.device)
        lora_A, lora_B = self.factors()
        weight = fold(weight, lora_A.to(weight.dtype), lora_B.to(weight.dtype), selected=[], scale=self.scale)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    # ---------------------------------------------------------------------------------------------- state dicts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._selected is None:
            return
        original = self._original()
        if original is not None:
            destination[prefix + "weight"] = original.to(self.weight)
        destination[prefix + "lora_A"], destination[prefix + "lora_B"] = self.factors()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load full tensors. A selection is undone for that and made again, with the same parameter objects."""
        selected, unselected, trained = self._selected, self._unselected, (self.lora_A, self.lora_B)
        self.unfold(discard_changes=True)  # the loaded weight replaces any changed one
        super()._load_from_state_dict(*arguments)
        if selected is None:
            return
        self.select(selected, unselected)
        for parameter, value in zip(trained, (self.lora_A, self.lora_B), strict=True):
            parameter.data = value.data  # loading with assign=True may bring another dtype
        self.lora_A, self.lora_B = trained  # an optimiser may hold these objects

    def extra_repr(self) -> str:
        """Return the sizes, the rank and the selection as text, for `repr`."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, scale={self.scale:g}"
        )
        if self._selected is not None:
            text += f", selected={list(self._selected)}, unselected={self._unselected!r}"
        return text


@torch.inference_mode(False)
@torch.no_grad()
def select_in_all(layers: Sequence[FusedPLoRALinear], chosen: Sequence[tuple[int, ...]], unselected: str) -> None:
    """Select in every layer its own `chosen` modules; one call of `fold_many_` folds all weights.

    The caller has checked the arguments (`check_selectable`) and sorted the indices. If the selection fails
    nevertheless, for instance without enough memory, no layer has a selection and all weights are the originals.
    """
    for layer in layers:
        layer.unfold()
    folds: dict[int, Fold] = {}
    try:
        for position, (layer, indices) in enumerate(zip(layers, chosen, strict=True)):
            fold_of_layer = layer._fold_of_others(indices) if unselected == "folded" else None
            if fold_of_layer is not None:
                folds[position] = fold_of_layer
        folded = dict(zip(folds, fold_many_(list(folds.values())), strict=True))
        for position, (layer, indices) in enumerate(zip(layers, chosen, strict=True)):
            layer._hold(indices, unselected, folded.get(position))
    except BaseException:
        for layer in layers:
            layer.unfold()
            layer._drop_original()
        raise


def _check_same_shape(name: str, parameter: Tensor, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise ShapeError(f"{name} is {tuple(value.shape)}; the layer needs {tuple(parameter.shape)}")
