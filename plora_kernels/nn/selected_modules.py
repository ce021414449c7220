"""Which of a layer's one-rank modules are trained: selecting some of them, and putting all of them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from plora_kernels.checks import check_unselected
from plora_kernels.errors import ShapeError, StateError
from plora_kernels.folding import Fold, fold, fold_many_
from plora_kernels.nn.adapter_dtype import beside
from plora_kernels.nn.distributed import gathered, is_sharded
from plora_kernels.nn.folded_weight import FoldedWeight
from plora_kernels.nn.replaced_parameters import mark_in_use, mark_replaced
from plora_kernels.selection import Selection, complement, host_indices, index_buffer

Pair = tuple[nn.Parameter, nn.Parameter]


class SelectedModules(FoldedWeight):
    """The factors A (R, K) and B (N, R) of a layer's R modules, of which a selection makes some the trained ones.

    `lora_A` and `lora_B` are the parameters that are trained: all R modules, or the compact (r, K) and (N, r) of a
    selection. While fewer than R are selected, `full_A` and `full_B` hold the values of all R. They are frozen
    parameters, as is `original_weight`, because DistributedDataParallel sends parameters once and buffers at every
    forward. None of the three is in a state dict.

    A parameter is used again where it fits: those of all R modules when the selection ends, compact ones of the same r
    as long as something, such as an optimiser, holds them. An optimiser that holds one the layer does not use raises at
    its next step.
    """

    rank: int
    scale: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    full_A: nn.Parameter | None
    full_B: nn.Parameter | None
    selected_index: Tensor | None
    weight_is_tied: bool
    trainable: bool = True  # whether the factors in use require gradients

    def _start_unselected(self) -> None:
        """Start with all R modules trained; `lora_A` and `lora_B` exist."""
        self.weight_is_tied = False
        self._selected: tuple[int, ...] | None = None
        self._unselected, self._selected_scale = "folded", self.scale
        self.register_parameter("full_A", None)
        self.register_parameter("full_B", None)
        self.selected_index = None
        self._divided_while_selected = False
        self._set_aside: Pair | None = None  # while fewer than R are selected: the parameters of all R
        self._compact: dict[int, tuple[TensorWeakRef, TensorWeakRef]] = {}  # by r: parameters used before

    # ----------------------------------------------------------------------------------------------- selection

    @property
    def selected(self) -> tuple[int, ...] | None:
        """The selected modules, sorted, or None without a selection (all R are trained)."""
        return self._selected

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, indices_or_mask: Selection, unselected: str = "folded") -> None:
        """Train these modules alone: Select-N-Fold. An earlier selection is undone first.

        `lora_A` and `lora_B` become compact, (r, K) and (N, r), in the order of the module numbers. Selecting as many
        modules as before keeps the parameter objects and writes the modules' values into them, so an optimiser or
        DistributedDataParallel made before stays right; its momentum is that of the modules before. With another r the
        objects are new: an optimiser that holds the old ones raises StateError at its next step, a
        DistributedDataParallel at its next forward. Selecting the same again changes nothing.

        Args:
            indices_or_mask: host indices, or a bool mask (R,); `[]` selects none.
            unselected: "folded" adds the other modules to the weight (the original is kept); "frozen" leaves the
                weight as it is and sums them without a gradient.

        Raises:
            SelectionError, ShapeError, ConfigError: the selection or `unselected` is not valid.
            StateError: the weight cannot be folded: it is trainable, shared with another module, or was changed; or
                `fully_shard` has divided the layer.
        """
        indices = host_indices(indices_or_mask, self.rank)
        self.check_selectable(unselected, len(indices))
        select_in_all([self], [indices], unselected)

    def set_trainable(self, trainable: bool) -> None:
        """Have the factors in use, and those that `select` and `unfold` bring into use, require gradients or not."""
        self.trainable = trainable
        self.lora_A.requires_grad_(trainable)
        self.lora_B.requires_grad_(trainable)

    def check_selectable(self, unselected: str, size: int | None = None) -> None:
        """Raise the ConfigError or StateError that `select` of `size` modules would raise; change nothing."""
        check_unselected(unselected)
        self.check_unfoldable()
        if any(is_sharded(parameter) for parameter in self.parameters(recurse=False)):
            raise StateError("fully_shard has divided the layer, and modules of a divided layer cannot be selected")
        if size not in (None, self.lora_A.shape[0]) and any(map(_has_hooks, (self.lora_A, self.lora_B))):
            raise StateError(
                "lora_A or lora_B has gradient hooks, which would be lost with the parameter: register them after "
                "selecting this number of modules"
            )
        if unselected == "frozen":
            return
        if self.weight.requires_grad:
            raise StateError("weight requires a gradient and cannot be folded: call weight.requires_grad_(False)")
        if self.weight_is_tied:
            raise StateError("weight is shared with another module and cannot be folded: use unselected='frozen'")

    def check_unfoldable(self) -> None:
        """Raise StateError if other code changed the weight while modules were folded into it, as `unfold` does."""
        self._refuse_divided_selection()
        if not self._weight_is_as_folded():
            raise StateError(
                "weight was changed while modules were folded into it: unfold(discard_changes=True) gives back the "
                "original without the change"
            )

    def stands(self, indices: tuple[int, ...], unselected: str) -> bool:
        """Say whether the layer has this selection already, folded with the scale it has now."""
        return (self._selected, self._unselected, self._selected_scale) == (indices, unselected, self.scale)

    def _fold_of_others(self, indices: tuple[int, ...]) -> Fold | None:
        """Keep the original and return the fold of all modules except `indices`, or None if that leaves none."""
        if not complement(indices, self.rank):
            return None
        lora_A, lora_B = (beside(self.weight, factor.detach()) for factor in (self.lora_A, self.lora_B))
        weight, out = self._keep_original()
        return Fold(weight, lora_A, lora_B, indices, self.scale, out=out)

    def _hold(
        self, indices: tuple[int, ...], unselected: str, folded: Tensor | None, before: Pair | None = None
    ) -> None:
        """Make a selection current; `folded` is the weight with the other modules folded in (None: none are).

        `before` are the compact parameters of a selection of as many modules that stood until now.
        """
        if folded is not None:
            self._take_folded(folded)
        self.selected_index = index = index_buffer(indices, self.lora_A.device)
        if len(indices) < self.rank:
            full, places = (self.lora_A, self.lora_B), index[: len(indices)].long()
            values = full[0].index_select(0, places), full[1].index_select(1, places)
            found = before or self._used_before(len(indices), full)
            self.lora_A, self.lora_B = self._written(found, values)
            self._compact[len(indices)] = TensorWeakRef(self.lora_A), TensorWeakRef(self.lora_B)
            # Other objects than those set aside: a wrapper made now must not take these for parameters it reduces.
            self.full_A, self.full_B = (nn.Parameter(whole.data, requires_grad=False) for whole in full)
            self._set_aside = full
            for parameter in full:
                mark_replaced(parameter, "select()")
        else:
            self.lora_A.requires_grad_(self.trainable)
            self.lora_B.requires_grad_(self.trainable)
        self._selected, self._unselected, self._selected_scale = indices, unselected, self.scale

    def _used_before(self, size: int, full: Pair) -> Pair | None:
        """Return the compact parameters of an earlier selection of this size, if they still exist and fit."""
        references = self._compact.get(size)
        if references is None:
            return None
        found = references[0](), references[1]()
        wanted = (size, full[0].shape[1]), (full[1].shape[0], size)
        for old, now, shape in zip(found, full, wanted, strict=True):
            if old is None or (tuple(old.shape), old.dtype, old.device) != (shape, now.dtype, now.device):
                return None
        lora_A, lora_B = (cast(nn.Parameter, parameter).requires_grad_(self.trainable) for parameter in found)
        return lora_A, lora_B  # type: ignore[return-value]

    def _written(self, found: Pair | None, values: tuple[Tensor, Tensor]) -> Pair:
        """Return parameters with these values: the `found` ones, written to, or new ones."""
        if found is None:
            return nn.Parameter(values[0], self.trainable), nn.Parameter(values[1], self.trainable)
        for parameter, value in zip(found, values, strict=True):
            parameter.copy_(value)
            parameter.grad = None  # it belongs to the modules before
            mark_in_use(parameter)
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def unfold(self, *, discard_changes: bool = False) -> None:
        """Undo the selection: `lora_A` and `lora_B` hold all R modules again, the weight is the original bit for bit.

        They are the parameter objects from before the selection, with the trained modules' values written into them.
        Without a selection it does nothing. If the weight's `.data` was replaced while modules were folded, the
        original is restored without an error, because that change cannot be detected.

        Args:
            discard_changes: restore the original even if other code changed the weight while modules were folded in.

        Raises:
            StateError: the weight was changed while it was folded, and `discard_changes` is not set.
        """
        if self._selected is None:
            return
        self._refuse_divided_selection()
        if not discard_changes:
            self.check_unfoldable()
        self._drop_original()
        if self.full_A is not None and self.full_B is not None and self.selected_index is not None:
            places = self.selected_index[: len(self._selected)].long()
            compact, values = (self.lora_A, self.lora_B), (self.full_A.data, self.full_B.data)
            for dim, (part, whole) in enumerate(zip(compact, values, strict=True)):
                whole.index_copy_(dim, places, part.to(whole))
                mark_replaced(part, "unfold()")
            full = self._set_aside or (nn.Parameter(values[0]), nn.Parameter(values[1]))
            for parameter, whole in zip(full, values, strict=True):
                parameter.data = whole
                torch.autograd.graph.increment_version(parameter)  # a graph that saved the values before must not run
                mark_in_use(parameter)
            self.lora_A, self.lora_B = full
            self.full_A = self.full_B = self._set_aside = None
        for parameter in (self.lora_A, self.lora_B):
            parameter.requires_grad_(self.trainable)
            parameter.data = self._beside_weight(parameter.data)  # cast, perhaps, while all R were selected
        self.selected_index, self._selected, self._unselected = None, None, "folded"

    def _beside_weight(self, factor: Tensor) -> Tensor:
        """Return a factor in a dtype that may stand beside the weight."""
        return beside(self.weight, factor)

    def _folded_anew(self, weight: Tensor) -> Tensor | None:
        if self._selected is None or self.full_A is None or self.full_B is None:
            return None
        lora_A, lora_B = (beside(weight, factor.detach()) for factor in (self.full_A, self.full_B))
        return fold(weight, lora_A, lora_B, self._selected, scale=self._selected_scale)

    def refuse_selection(self, action: str) -> None:
        """Raise StateError if modules are selected; `action` names in the message what cannot be done then."""
        if self._selected is not None:
            raise StateError(f"cannot {action} while modules {list(self._selected)} are selected; call unfold() first")

    # ------------------------------------------------------------------------------------------------- factors

    def _merged_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (R, K) and B (N, R) with the compact parameters at their modules, differentiable in those."""
        self._refuse_divided_selection()
        if self.full_A is None or self.full_B is None or self.selected_index is None:
            return self.lora_A, self.lora_B
        places = self.selected_index[: self.lora_A.shape[0]].long().to(self.full_A.device)
        # A caller may have cast the trained parameters.
        lora_A, lora_B = self.lora_A.to(self.full_A.dtype), self.lora_B.to(self.full_B.dtype)
        return self.full_A.index_copy(0, places, lora_A), self.full_B.index_copy(1, places, lora_B)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return copies of A (R, K) and B (N, R), trained modules included.

        Of a layer that `fully_shard` divided the factors are gathered: all processes must call this together.

        Raises:
            StateError: `fully_shard` divided the layer during a selection, or another wrapper divided it.
        """
        lora_A, lora_B = (gathered(factor.detach()) for factor in self._merged_factors())
        if (lora_A.dim(), lora_A.shape[0], lora_B.shape[-1]) != (2, self.rank, self.rank):
            raise StateError(
                f"lora_A is {tuple(lora_A.shape)} in a layer of rank {self.rank}: a wrapper, such as "
                "FullyShardedDataParallel, has divided it; ask for the factors before wrapping the model"
            )
        return lora_A.clone(), lora_B.clone()

    @torch.no_grad()
    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Copy A (R, K) and B (N, R) into the layer.

        Raises:
            StateError: modules are selected, or `fully_shard` has divided the layer.
            ShapeError: the shapes differ from the layer's.
        """
        self.check_settable(lora_A, lora_B)
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Copy A (R, K) and B (N, R) into the layer; a selection is undone for that and made again, on the new values.

        The parameter objects stay the same. The errors are those of `set_factors`, but for the selection, and of
        `unfold`.
        """
        selected, unselected, held = self._selected, self._unselected, (self.lora_A, self.lora_B)
        self.unfold()
        self.set_factors(lora_A, lora_B)
        if selected is not None:
            self.select(selected, unselected)
        del held  # until here, because the layer refers to compact parameters weakly once it is unfolded

    def check_settable(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Raise the StateError or ShapeError that `set_factors` would raise; change nothing."""
        self.refuse_selection("set the factors")
        for name, parameter, value in (("lora_A", self.lora_A, lora_A), ("lora_B", self.lora_B, lora_B)):
            if is_sharded(parameter):
                raise StateError("fully_shard has divided the layer: set the factors before it")
            if parameter.shape != value.shape:
                raise ShapeError(f"{name} is {tuple(value.shape)}; the layer needs {tuple(parameter.shape)}")

    # ----------------------------------------------------------------------------------- state dicts, copies, moves

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._selected is None:
            return
        for name in ("full_A", "full_B", "original_weight"):
            destination.pop(prefix + name, None)
        original = self._original()
        if original is not None:
            destination[prefix + "weight"] = original.detach().to(self.weight)
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
            mark_in_use(parameter)
        self.lora_A, self.lora_B = trained  # an optimiser may hold these objects
        self._compact[len(selected)] = TensorWeakRef(self.lora_A), TensorWeakRef(self.lora_B)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._selected is not None:
            self.selected_index = index_buffer(self._selected, self.weight.device)
        if self._set_aside is not None and self.full_A is not None and self.full_B is not None:
            for parameter, moved in zip(self._set_aside, (self.full_A, self.full_B), strict=True):
                parameter.data = moved.data
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the layer without the parameters it does not use at the moment, and never as disabled.

        The context that enables a disabled layer again does not know its copies.
        """
        return {**self.__dict__, "_compact": {}, "_set_aside": None, "disabled": False}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and note if `fully_shard` divides a parameter while modules are selected."""
        if isinstance(value, nn.Parameter) and self.__dict__.get("_selected") is not None and is_sharded(value):
            self._divided_while_selected = True
        super().__setattr__(name, value)

    def _refuse_divided_selection(self) -> None:
        """Raise StateError if `fully_shard` divided the layer while modules were selected.

        It holds the parameters that it divided, so the layer could not put others in their place afterwards.
        """
        if self._divided_while_selected:
            raise StateError(
                f"fully_shard divided the layer while modules {list(self._selected or ())} were selected, and they "
                "could not be put back among the others: build the model again and shard it without a selection"
            )


@torch.inference_mode(False)
@torch.no_grad()
def select_in_all(layers: Sequence[SelectedModules], chosen: Sequence[tuple[int, ...]], unselected: str) -> None:
    """Select in every layer its own `chosen` modules; one call of `fold_many_` folds all weights.

    The caller has checked the arguments (`check_selectable`) and sorted the indices. A layer whose selection stands
    already is not touched. If the selection fails nevertheless, for instance without enough memory, no layer has a
    selection and all weights are the originals.
    """
    changing = [
        (layer, indices) for layer, indices in zip(layers, chosen, strict=True) if not layer.stands(indices, unselected)
    ]
    # Held here, because the layers refer to their compact parameters weakly once they are unfolded.
    before: list[Pair | None] = [
        (layer.lora_A, layer.lora_B) if layer.full_A is not None and layer.lora_A.shape[0] == len(indices) else None
        for layer, indices in changing
    ]
    folds: dict[int, Fold] = {}
    try:
        for layer, _ in changing:
            layer.unfold()
        for position, (layer, indices) in enumerate(changing):
            fold_of_layer = layer._fold_of_others(indices) if unselected == "folded" else None
            if fold_of_layer is not None:
                folds[position] = fold_of_layer
        folded = dict(zip(folds, fold_many_(list(folds.values())), strict=True))
        for position, (layer, indices) in enumerate(changing):
            layer._hold(indices, unselected, folded.get(position), before[position])
    except BaseException:
        for layer in layers:
            layer.unfold(discard_changes=True)
            layer._drop_original()
        raise


def _has_hooks(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
