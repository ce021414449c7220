"""`Injected`: a model with its adapted layers, and what can be done with all of them together."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from plora_kernels.errors import StateError, TargetError
from plora_kernels.nn.call_watch import CallWatch
from plora_kernels.nn.config import PLoRAConfig
from plora_kernels.nn.layer_errors import naming
from plora_kernels.nn.linear import FusedPLoRALinear
from plora_kernels.nn.merging import keep_untied, merged_state_dict, merged_weights, tied_layers, warn_of_untied
from plora_kernels.nn.replaced_parameters import mark_replaced
from plora_kernels.nn.row_groups import GroupModules
from plora_kernels.nn.selected_modules import select_in_all
from plora_kernels.nn.targets import is_within, shortened
from plora_kernels.selection import Selection, host_indices


@dataclass
class Injected:
    """A model with its adapted layers: what `inject` returns.

    Attributes:
        model: the model, changed in place. config: what was injected.
        layers: the adapted layers by full module name, in model order.
        saved_modules: names of the modules that are trained in full and saved whole, those inside another one left out.
        projections: the groups of layers that `fuse_projections` found to share an input, by name.
        carried: base tensors that a loaded adapter brought along, such as grown embeddings: they are saved with it.

    >>> from plora_kernels.nn.inject import inject
    >>> handle = inject(nn.Sequential(nn.Linear(8, 8)), PLoRAConfig(rank=2, target_modules=["0"]))
    >>> {name: (A.shape, B.shape) for name, (A, B) in handle.factors().items()}
    {'0': (torch.Size([2, 8]), torch.Size([8, 2]))}
    """

    model: nn.Module
    config: PLoRAConfig
    layers: dict[str, FusedPLoRALinear]
    saved_modules: tuple[str, ...] = ()
    projections: tuple[tuple[str, ...], ...] = ()
    carried: tuple[str, ...] = field(default=(), kw_only=True)
    _linears: dict[str, nn.Linear] = field(default_factory=dict, repr=False)
    _required_grad: dict[str, bool] = field(default_factory=dict, repr=False)
    _originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _put_back: ExitStack = field(default_factory=ExitStack, repr=False)
    _watch: CallWatch | None = field(default=None, repr=False)

    def select(self, selection: Selection | Mapping[str, Selection], unselected: str = "folded") -> None:
        """Select modules in every layer: one selection for all, or a mapping from layer name to selection.

        All arguments are checked before anything changes; on a GPU the weights of one dtype are folded together
        (`fold_many_`). If a fold fails nevertheless, for instance without enough memory, no selection is left.

        Raises:
            TargetError: the mapping misses a layer or names one that does not exist.
            SelectionError, ShapeError, ConfigError, StateError: see `FusedPLoRALinear.select`.
        """
        self.check_present()
        if isinstance(selection, Mapping):
            wanted = dict(selection)
            self._check_names(wanted, "selection")
        else:
            wanted = dict.fromkeys(self.layers, selection)
        chosen: list[tuple[int, ...]] = []
        for name, layer in self.layers.items():
            chosen.append(host_indices(wanted[name], layer.rank))
            with naming(name):
                layer.check_selectable(unselected, len(chosen[-1]))
        select_in_all(list(self.layers.values()), chosen, unselected)

    def unfold(self, *, discard_changes: bool = False) -> None:
        """Undo the selection in every layer and restore the original base weights, bit for bit.

        Raises:
            StateError: a weight was changed while it was folded, and `discard_changes` is not set. No layer is changed.
        """
        if not discard_changes:
            for name, layer in self.layers.items():
                with naming(name):
                    layer.check_unfoldable()
        for layer in self.layers.values():
            layer.unfold(discard_changes=True)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return copies of every layer's A (R, K) and B (N, R), trained modules included."""
        return {name: layer.factors() for name, layer in self.layers.items()}

    def set_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Copy A (R, K) and B (N, R) into every layer.

        Raises:
            TargetError: the mapping misses a layer or names one that does not exist.
            StateError: modules are selected. ShapeError: a tensor does not fit. No layer is changed.
        """
        self._check_names(factors, "factors")
        for name, layer in self.layers.items():
            layer.check_settable(*factors[name])
        for name, layer in self.layers.items():
            layer.set_factors(*factors[name])

    def set_trainable(self, trainable: bool) -> None:
        """Have the factors of every layer, and the modules that are saved whole, require gradients or not.

        It holds for selections made later too. Everything else in the model stays as it is.
        """
        self.check_present()
        for layer in self.layers.values():
            layer.set_trainable(trainable)
        for name in self.saved_modules:
            self.model.get_submodule(name).requires_grad_(trainable)

    @contextmanager
    def grouped(self, groups: Mapping[str, GroupModules]) -> Iterator[None]:
        """Inside the context, give every group of a batch's samples its own modules: many adapters, one base pass.

        Every layer uses its entry of `groups`, with factors (C, R, K) and (C, N, R), in place of its own modules.
        Gradients go to these stacked factors. A layer must get the samples of a batch in order along the leading axis.
        Layers that do not, such as routed experts, must not be adapted: this cannot be detected.

        Raises:
            TargetError: the mapping misses a layer or names one that does not exist.
            StateError: modules are selected. ShapeError, RankError: factors do not fit their layer.
        """
        self.check_present()
        self._check_names(groups, "groups")
        for name, layer in self.layers.items():
            layer.refuse_selection("run groups")
            layer.check_groups(groups[name])
        before = {name: layer.groups for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.groups = groups[name]
            yield
        finally:
            for name, layer in self.layers.items():
                layer.groups = before[name]

    @contextmanager
    def disable(self, *, with_saved_modules: bool = False) -> Iterator[None]:
        """Inside the context the model computes as the base does, bit for bit: y = x Wᵀ + bias in every adapted layer.

        Whatever is selected or folded, W is the original weight, and nothing of the model is written or copied: an
        original in host memory is brought over for each call. Parameters, selection and state dict stay as they are,
        also to optimisers and to graphs made before. Contexts may be nested, and in one of `grouped` the groups are
        disabled too. A quantised layer computes with its dequantised weight, as it does with its modules. The backward
        of a checkpointed forward, which runs that again, belongs into the context too.

        Args:
            with_saved_modules: allow modules that are trained or were loaded whole, with the values they have now: the
                base's own are not in the model any more.

        Raises:
            StateError: the adapter was taken out; or there are such modules, and `with_saved_modules` is not set.

        >>> from plora_kernels.nn.inject import inject
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> x, handle = torch.ones(2, 8), inject(model, PLoRAConfig(rank=2, target_modules=["0"]))
        >>> _ = nn.init.ones_(handle.layers["0"].lora_B)
        >>> with handle.disable():
        ...     torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        True
        """
        self.check_present()
        others = [key for key in self._originals if not is_within(self.saved_modules, key)]
        changed = [*self.saved_modules, *others]
        if changed and not with_saved_modules:
            raise StateError(
                f"the model cannot compute as its base: {shortened(changed)} are trained or were loaded whole; "
                "disable(with_saved_modules=True) takes them with the values they have now"
            )
        before = {name: layer.disabled for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.disabled = True
            yield
        finally:
            for name, layer in self.layers.items():
                layer.disabled = before[name]

    def replace_values(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into tensors of the model, by their keys in its state dict; `restore` puts the first ones back.

        The copies of the values before the first replacement stay on their device.
        """
        new = values.keys() - self._originals.keys()
        self._originals |= {key: _tensor_of(self.model, key).detach().clone() for key in new}
        self.write_values(values)

    def write_values(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into tensors of the model, by their keys in its state dict; `restore` leaves them there."""
        for key, value in values.items():
            _write(self.model, key, value)

    def put_back_with(self, stack: ExitStack) -> None:
        """Have `restore` close the stack too, once the linears are back."""
        self._put_back = stack

    @torch.no_grad()
    def restore(self) -> nn.Module:
        """Put back the plain linears that `inject` replaced, drop the adapter, and return the model.

        What a loaded adapter replaced besides, such as whole modules and embeddings, has its former values again, bit
        for bit, and weights that were tied are so again. Modules that `inject` made trainable keep what they learned.

        Raises:
            StateError: a weight was changed while it was folded, or one to be put back was resized. The model is left
                as it is.
        """
        self.check_present()
        for key, original in self._originals.items():
            if (now := _tensor_of(self.model, key).shape) != original.shape:
                raise StateError(f"{key!r} was {tuple(original.shape)} and is {tuple(now)} now; resize it back first")
        self.unfold()
        self._put_linears_back("restore()")
        for key, original in self._originals.items():
            _write(self.model, key, original)
        self._put_back.close()
        self._end()
        return self.model

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Put plain linears with the weights W + s·B A in place of the layers, for good, and return the model.

        W is the base's weight, A and B are those of all modules, whatever is selected. Each weight is computed in fp32,
        rounded once, and given to the base's own parameter. Until all are computed, which needs the memory of the
        adapted weights once more, nothing changes. Modules that were trained or loaded whole keep their values.

        A layer that is tied, such as an adapted `lm_head`, gets a weight of its own, after a warning, and the model's
        `config.tie_word_embeddings` becomes False, so that the model can be saved.

        Raises:
            StateError: a weight is quantised, divided by `fully_shard`, or was changed while modules were folded into
                it; or groups run. The model is as it was.

        >>> from plora_kernels.nn.inject import inject
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> handle = inject(model, PLoRAConfig(rank=2, target_modules=["0"]))
        >>> type(handle.merge()[0]).__name__
        'Linear'
        """
        self.check_present()
        weights = merged_weights(self.layers)
        tied = tied_layers(self.model, self.layers)
        self.unfold()
        for name, weight in weights.items():
            self.layers[name].take_merged(weight, own=name in tied)
        self._put_linears_back("merge()")
        self._put_back.pop_all()
        keep_untied(self.model, tied)
        self._end()
        return self.model

    def merged_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict that the plain model has with the adapter merged; the model is not changed.

        Its keys are those of the plain model, and `save_pretrained(folder, state_dict=...)` writes it. The merged
        weights, as `merge` makes them, are new tensors; all others are the model's own, as in `state_dict`.

        Raises:
            StateError: as `merge` does.

        >>> from plora_kernels.nn.inject import inject
        >>> handle = inject(nn.Sequential(nn.Linear(8, 8)), PLoRAConfig(rank=2, target_modules=["0"]))
        >>> list(handle.merged_state_dict())
        ['0.weight', '0.bias']
        """
        self.check_present()
        merged = merged_state_dict(self.model, self.layers)
        warn_of_untied(
            tied_layers(self.model, self.layers), "set config.tie_word_embeddings = False before saving it", 1
        )
        return merged

    def _put_linears_back(self, action: str) -> None:
        """Put the plain linears in place of the layers, with the weights and biases that these have.

        An optimiser that holds a layer's factors raises an error that names the action.
        """
        if self._watch is not None:
            self._watch.stop()
        for name, layer in self.layers.items():
            linear = layer.give_base(self._linears[name])
            self.model.set_submodule(name, linear.train(layer.training))
            mark_replaced(layer.lora_A, action)
            mark_replaced(layer.lora_B, action)

    def _end(self) -> None:
        """Give the model's parameters their former `requires_grad`; the handle has no adapter any more."""
        self._originals.clear()
        for name, parameter in self.model.named_parameters():
            if name in self._required_grad:
                parameter.requires_grad_(self._required_grad[name])
        self._linears.clear()

    def check_present(self) -> None:
        """Raise StateError if the adapter was taken out of the model."""
        if not self._linears:
            raise StateError("the adapter was taken out by restore() or merge(); inject it again")

    def _check_names(self, mapping: Mapping[str, object], what: str) -> None:
        for name in mapping:
            if name not in self.layers:
                near = difflib.get_close_matches(name, self.layers, n=3, cutoff=0.0)
                raise TargetError(f"{what} names layer {name!r}; the nearest adapted layers are {near}")
        missing = [name for name in self.layers if name not in mapping]
        if missing:
            raise TargetError(f"{what} misses layer {missing[0]!r}; all {len(self.layers)} adapted layers are needed")


def _tensor_of(model: nn.Module, key: str) -> Tensor:
    """Return the parameter or buffer that has this key in the model's state dict."""
    owner, _, leaf = key.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(owner), leaf))


def _write(model: nn.Module, key: str, value: Tensor) -> None:
    with torch.no_grad():
        _tensor_of(model, key).copy_(value)
