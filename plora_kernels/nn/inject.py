"""Put `FusedPLoRALinear` into a model by module names, and take it out again."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from plora_kernels.checks import DTYPES
from plora_kernels.errors import DTypeError, StateError, TargetError
from plora_kernels.nn.call_watch import CallWatch
from plora_kernels.nn.config import PLoRAConfig
from plora_kernels.nn.linear import FusedPLoRALinear
from plora_kernels.nn.plain_names import is_compiled
from plora_kernels.nn.quantized.known import kind_of
from plora_kernels.nn.quantized.layer import QuantizedPLoRALinear
from plora_kernels.nn.replaced_parameters import mark_replaced
from plora_kernels.nn.row_groups import GroupModules
from plora_kernels.nn.saved_modules import modules_saved_whole
from plora_kernels.nn.selected_modules import select_in_all
from plora_kernels.nn.shared_input import SiblingPLoRALinear, find_siblings
from plora_kernels.nn.storages import storage_of, storage_uses
from plora_kernels.nn.targets import find_targets, nearest
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
        self._check_present()
        if isinstance(selection, Mapping):
            wanted = dict(selection)
            self._check_names(wanted, "selection")
        else:
            wanted = dict.fromkeys(self.layers, selection)
        chosen: list[tuple[int, ...]] = []
        for name, layer in self.layers.items():
            chosen.append(host_indices(wanted[name], layer.rank))
            with _naming(name):
                layer.check_selectable(unselected, len(chosen[-1]))
        select_in_all(list(self.layers.values()), chosen, unselected)

    def unfold(self, *, discard_changes: bool = False) -> None:
        """Undo the selection in every layer and restore the original base weights, bit for bit.

        Raises:
            StateError: a weight was changed while it was folded, and `discard_changes` is not set. No layer is changed.
        """
        if not discard_changes:
            for name, layer in self.layers.items():
                with _naming(name):
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
        self._check_present()
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

    def replace_values(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into tensors of the model, by their keys in its state dict; `restore` puts the present ones back.

        The copies of the present values stay on their device.
        """
        self._originals |= {key: _tensor_of(self.model, key).detach().clone() for key in values}
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
        self._check_present()
        for key, original in self._originals.items():
            if (now := _tensor_of(self.model, key).shape) != original.shape:
                raise StateError(f"{key!r} was {tuple(original.shape)} and is {tuple(now)} now; resize it back first")
        self.unfold()
        if self._watch is not None:
            self._watch.stop()
        for name, layer in self.layers.items():
            linear = layer.give_base(self._linears[name])
            self.model.set_submodule(name, linear.train(layer.training))
            mark_replaced(layer.lora_A, "restore()")
            mark_replaced(layer.lora_B, "restore()")
        for key, original in self._originals.items():
            _write(self.model, key, original)
        self._originals.clear()
        self._put_back.close()
        for name, parameter in self.model.named_parameters():
            if name in self._required_grad:
                parameter.requires_grad_(self._required_grad[name])
        self._linears.clear()
        return self.model

    def _check_present(self) -> None:
        if not self._linears:
            raise StateError("the adapter was taken out by restore(); inject it again")

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


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Within the context, put the layer's name before the message of a StateError or DTypeError."""
    try:
        yield
    except (StateError, DTypeError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None


def inject(model: nn.Module, config: PLoRAConfig) -> Injected:
    """Replace the targeted linears of `model` by `FusedPLoRALinear`, in place, and freeze everything else.

    Quantised linears of bitsandbytes and torchao become `QuantizedPLoRALinear`, whose modules are never folded. The
    layers share the model's own weights; no weight is copied. Afterwards only the adapters and the modules that are
    saved whole are trainable: those of `config.modules_to_save` and the head that belongs to `config.task_type`. Until
    they are trained, the model's results are the same as before. If anything is refused or fails, the model is as it
    was.

    The model's first forward pass warns once about adapted layers that it does not call (`PLoRAWarning`).

    Raises:
        TargetError: a target does not exist, is not a plain nn.Linear or one that is quantised in a known way, or its
            weight is read past the layer; or a module to save does not exist. DTypeError: a target takes no factors of
            `config.adapter_dtype`.
        StateError: the model holds adapted layers already, PEFT's or these, is compiled or wrapped for data
            parallelism, or a module that is saved whole shares its weight with another.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> handle = inject(model, PLoRAConfig(rank=2, target_modules=["0"]))
    >>> handle.select([1])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B']
    >>> handle.restore() is model
    True
    """
    _check_plain(model)
    saved = _find_saved(model, config)
    names = find_targets(model, config)
    uses = storage_uses(model)
    for name in saved:
        for tensor in model.get_submodule(name).parameters():
            if uses[storage_of(tensor)] > 1:
                raise StateError(f"module to save {name!r} shares a weight with another module; untie it first")
            if tensor.dtype not in DTYPES:
                raise StateError(f"module to save {name!r} holds {tensor.dtype}, which cannot be trained")
    # The cast holds: find_targets has refused everything but nn.Linear and quantised subclasses of it.
    linears = {name: cast(nn.Linear, model.get_submodule(name)) for name in names}
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handle = Injected(model, config, {}, saved, (), linears, required_grad)
    try:
        _build_layers(handle, uses)
        model.requires_grad_(False)
        for name in saved:
            model.get_submodule(name).requires_grad_(True)
        for name, layer in handle.layers.items():
            model.set_submodule(name, layer)
        handle._watch = CallWatch(model, handle.layers)
    except BaseException:
        handle.restore()
        raise
    return handle


def _build_layers(handle: Injected, uses: Mapping[int, int]) -> None:
    """Make the layers for the handle's linears; the model does not have them yet."""
    config, linears = handle.config, handle._linears
    quantized = {name for name, linear in linears.items() if kind_of(linear) is not None}
    dense = {name: linear for name, linear in linears.items() if name not in quantized}
    handle.projections = tuple(find_siblings(dense)) if config.fuse_projections else ()
    siblings = {name for group in handle.projections for name in group}
    for name, linear in linears.items():
        alone = QuantizedPLoRALinear if name in quantized else FusedPLoRALinear
        with _naming(name):
            layer = (SiblingPLoRALinear if name in siblings else alone).from_linear(
                linear, config.rank_of(name), config.alpha_of(name), config.rank_stabilized, config.dropout,
                config.original, config.adapter_dtype,
            )  # fmt: skip
        layer.weight_is_tied = uses[storage_of(linear.weight)] > 1
        handle.layers[name] = layer
    for group in handle.projections:
        SiblingPLoRALinear.group([cast(SiblingPLoRALinear, handle.layers[name]) for name in group])


def _check_plain(model: nn.Module) -> None:
    """Raise StateError if the model has adapters already, or is inside something that has to be made afterwards."""
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, FusedPLoRALinear):
            raise StateError("the model holds FusedPLoRALinear layers already; call restore() on their handle first")
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            raise StateError(
                f"{where} is PEFT's {type(module).__name__}; call merge_and_unload() or unload() on the PeftModel, or "
                "save the adapter with PEFT and load it into the plain model with load_peft"
            )
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise StateError(f"{where} has no weights yet; call the model once before adapters are injected")
        if is_compiled(module):
            raise StateError(f"{where} is compiled; inject into the plain one, its _orig_mod, and compile afterwards")
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise StateError(f"{where} is a {type(module).__name__}; inject into its module and wrap that afterwards")


def _find_saved(model: nn.Module, config: PLoRAConfig) -> tuple[str, ...]:
    """Return the modules that are saved whole; every entry of `modules_to_save` has to match one."""
    known = [name for name, _ in model.named_modules() if name]
    for entry in config.modules_to_save:
        if not any(name.endswith(entry) for name in known):
            raise TargetError(f"module to save {entry!r} is not in the model; {nearest(entry, known)}")
    return modules_saved_whole(model, config.modules_to_save, config.task_type)
