"""Put `FusedPLoRALinear` into a model by module names, and take it out again."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from plora_kernels.checks import check_positive, check_probability
from plora_kernels.errors import ConfigError, StateError, TargetError
from plora_kernels.nn.folded_weight import check_original
from plora_kernels.nn.linear import FusedPLoRALinear, check_replaceable, select_in_all
from plora_kernels.nn.row_groups import GroupModules
from plora_kernels.nn.saved_modules import outermost
from plora_kernels.nn.shared_input import SiblingPLoRALinear, find_siblings
from plora_kernels.selection import Selection, check_rank, host_indices

ALL_LINEAR = "all-linear"
T = TypeVar("T")


@dataclass(frozen=True)
class PLoRAConfig:
    """What to inject: the rank and scale of the adapter and the modules that get one.

    Attributes:
        rank: R, the number of one-rank modules, 1–256.
        alpha: α; the scale is α/R, or α/√R if `rank_stabilized`.
        dropout: p of LoRA dropout, in training mode.
        target_modules: as in PEFT: a list of names (whole, or the end of a name after a dot), a regular expression
            that must match a whole name, or "all-linear" for every nn.Linear but the output layer (see `task_type`).
        exclude_modules: names or an expression, matched the same way, of modules that are not replaced.
        modules_to_save: names (whole or the end of a name) of modules that stay trainable in full and are saved
            with the adapter, such as a classification head.
        task_type: PEFT's task type, such as "SEQ_CLS". It is saved, and with "SEQ_CLS" "all-linear" leaves out the
            classification head.
        rank_pattern, alpha_pattern: as in PEFT: another rank or α for modules whose name ends with the key.
        original: where the original of a folded weight is kept, "device" or "host".
        fuse_projections: compute targeted siblings that read one tensor, such as q, k and v or gate and up, together,
            and their joint input gradient too: each in one launch, but on Hopper GPUs with more than 1,024 rows of half
            precision by a product for each layer, which is faster there. The model's structure and results do not
            change.

    Raises:
        RankError, ConfigError: a value cannot be used.

    >>> config = PLoRAConfig(rank=8, alpha=16, target_modules=["q_proj", "v_proj"])
    >>> config.rank_of("layers.0.q_proj")
    8
    """

    rank: int = 16
    alpha: float = 32.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    target_modules: Sequence[str] | str = ("q_proj", "v_proj")
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] = ()
    task_type: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    original: str = "device"
    fuse_projections: bool = False

    def rank_of(self, name: str) -> int:
        """Return R for the module of this name."""
        return _by_pattern(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Return α for the module of this name."""
        return _by_pattern(self.alpha_pattern, name, self.alpha)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            check_rank(rank)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            check_positive("alpha", alpha)
        expressions = {"rank_pattern": list(self.rank_pattern), "alpha_pattern": list(self.alpha_pattern)}
        for name in ("target_modules", "exclude_modules"):
            expressions[name] = [value] if isinstance(value := getattr(self, name), str) else []
        for name, patterns in expressions.items():
            for pattern in patterns:
                _check_expression(name, pattern)
        check_probability("dropout", self.dropout)
        check_original(self.original)
        if not self.target_modules:
            raise ConfigError("target_modules is empty; name modules, or use 'all-linear'")
        if isinstance(self.modules_to_save, str) or self.modules_to_save is None:
            raise ConfigError(f"modules_to_save is {self.modules_to_save!r}; a list of names is needed")


def _check_expression(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{name} holds {pattern!r}, which is not a regular expression: {error}") from None


def _by_pattern(pattern: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first key that is the end of `name` (an expression, after a dot or whole), as in PEFT."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _matches(pattern: Sequence[str] | str, name: str) -> bool:
    """Match a module name as PEFT does: an expression against all of it, list entries as whole names or suffixes."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in pattern)


def _within(entries: Iterable[str], name: str) -> bool:
    """Say whether a module is one of `entries` (whole name or suffix) or lies inside one."""
    return any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", name) for entry in entries)


def _output_layer(model: nn.Module, task_type: str | None) -> nn.Module | None:
    """Return the module that "all-linear" leaves out as PEFT does: the LM head, or the head of a SEQ_CLS model."""
    embeddings = getattr(model, "get_output_embeddings", None)
    if not callable(embeddings):
        return None
    head = embeddings()
    if head is None and task_type == "SEQ_CLS":
        head = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    return head


def find_targets(model: nn.Module, config: PLoRAConfig) -> list[str]:
    """Return the names of the modules that `config` targets, in model order.

    Raises:
        TargetError: an entry matches no module, or no module is left; the message gives the nearest names.
    """
    kept = [name for name, _ in model.named_modules() if name and not _within(config.modules_to_save, name)]
    if config.exclude_modules:
        kept = [name for name in kept if not _matches(config.exclude_modules, name)]
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        head = _output_layer(model, config.task_type)
        modules = {name: model.get_submodule(name) for name in kept}
        names = [name for name, module in modules.items() if type(module) is nn.Linear and module is not head]
        if not names:
            raise TargetError("target_modules is 'all-linear', but the model has no nn.Linear besides its output layer")
        return names
    if not isinstance(config.target_modules, str):
        for entry in config.target_modules:
            if not any(_matches([entry], name) for name in kept):
                raise TargetError(f"target module {entry!r} is not in the model; {_nearest(entry, kept)}")
    names = [name for name in kept if _matches(config.target_modules, name)]
    if not names:
        raise TargetError(f"target_modules {config.target_modules!r} matches no module; {_nearest('', kept)}")
    return names


def _nearest(wanted: str, names: Iterable[str]) -> str:
    """Return a phrase with the module names most like `wanted` (their last parts, each once)."""
    tails = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()))
    near = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], tails, n=3, cutoff=0.4) or tails[:8]
    return f"the nearest names that exist are {', '.join(map(repr, near))}"


@dataclass
class Injected:
    """A model with its adapted layers: what `inject` returns.

    Attributes:
        model: the model, changed in place. config: what was injected.
        layers: the adapted layers by full module name, in model order.
        saved_modules: names of the modules that `modules_to_save` matched, without those that lie inside another one.
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
            layer.check_selectable(unselected)
        select_in_all(list(self.layers.values()), chosen, unselected)

    def unfold(self, *, discard_changes: bool = False) -> None:
        """Undo the selection in every layer and restore the original base weights, bit for bit.

        Raises:
            StateError: a weight was changed while it was folded, and `discard_changes` is not set. No layer is changed.
        """
        if not discard_changes:
            for layer in self.layers.values():
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
            StateError: modules are selected. ShapeError: a tensor does not fit.
        """
        self._check_names(factors, "factors")
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
            groups[name].check(layer.weight)
        before = {name: layer.groups for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.groups = groups[name]
            yield
        finally:
            for name, layer in self.layers.items():
                layer.groups = before[name]

    @torch.no_grad()
    def restore(self) -> nn.Module:
        """Put back the plain linears that `inject` replaced, drop the adapter, and return the model."""
        self._check_present()
        self.unfold()
        for name, linear in self._linears.items():
            layer = self.layers[name]
            # Moving the model or loading a state dict may have replaced the parameters.
            linear.weight, linear.bias = layer.weight, cast(nn.Parameter, layer.bias)
            self.model.set_submodule(name, linear.train(layer.training))
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


def inject(model: nn.Module, config: PLoRAConfig) -> Injected:
    """Replace the targeted linears of `model` by `FusedPLoRALinear`, in place, and freeze everything else.

    The layers share the model's own weights; no weight is copied. Afterwards only the adapters and the modules named by
    `config.modules_to_save` are trainable. Until they are trained, the model's results are the same as before.

    Raises:
        TargetError: a target does not exist, is not a plain nn.Linear, or a module to save does not exist.
        StateError: the model holds adapted layers already, or a module to save shares its weight with another.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> handle = inject(model, PLoRAConfig(rank=2, target_modules=["0"]))
    >>> handle.select([1])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B']
    >>> handle.restore() is model
    True
    """
    if any(isinstance(module, FusedPLoRALinear) for module in model.modules()):
        raise StateError("the model holds FusedPLoRALinear layers already; call restore() on their handle first")
    names = find_targets(model, config)
    for name in names:
        check_replaceable(model.get_submodule(name), f"target module {name!r} is")
        _check_parent(model, name)
    saved = outermost(name for name, _ in model.named_modules() if _matches(list(config.modules_to_save), name))
    for entry in config.modules_to_save:
        if not any(_matches([entry], name) for name, _ in model.named_modules()):
            known = [name for name, _ in model.named_modules() if name]
            raise TargetError(f"module to save {entry!r} is not in the model; {_nearest(entry, known)}")
    shared = _shared_storages(model)
    for name in saved:
        if any(_storage(tensor) in shared for tensor in model.get_submodule(name).parameters()):
            raise StateError(f"module to save {name!r} shares a weight with another module; untie it first")
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    layers: dict[str, FusedPLoRALinear] = {}
    # The casts hold: check_replaceable has refused everything but a plain nn.Linear.
    linears = {name: cast(nn.Linear, model.get_submodule(name)) for name in names}
    projections = tuple(find_siblings(linears)) if config.fuse_projections else ()
    siblings = {name for group in projections for name in group}
    for name, linear in linears.items():
        layer = (SiblingPLoRALinear if name in siblings else FusedPLoRALinear).from_linear(
            linear, config.rank_of(name), config.alpha_of(name), config.rank_stabilized, config.dropout, config.original
        )
        layer.weight_is_tied = _storage(linear.weight) in shared
        model.set_submodule(name, layer)
        layers[name] = layer
    for group in projections:
        SiblingPLoRALinear.group([cast(SiblingPLoRALinear, layers[name]) for name in group])
    return Injected(model, config, layers, saved, projections, linears, required_grad)


def _check_parent(model: nn.Module, name: str) -> None:
    """Raise TargetError if the parent module would use the linear's weight directly and so skip the adapter."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TargetError(
            f"target module {name!r} is read past any adapter by nn.TransformerEncoderLayer's fast path in evaluation; "
            "call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _shared_storages(model: nn.Module) -> set[int]:
    """Return the storages that more than one parameter or buffer name of the model uses."""
    places = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    counts = Counter(_storage(tensor) for _, tensor in places)
    return {storage for storage, count in counts.items() if count > 1}
