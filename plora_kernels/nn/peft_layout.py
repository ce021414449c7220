"""What PEFT makes of a model with a LoRA configuration: layers it adapts, modules it saves whole, keys of its file.

PEFT itself is asked: it builds its own model on an outline, the model's modules over tensors without memory. So target
names, patterns, exclusions and the heads of tasks mean here what they mean to the installed version of PEFT.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plora_kernels.errors import TargetError
from plora_kernels.nn.adapter_config import first_line
from plora_kernels.nn.linear import FusedPLoRALinear
from plora_kernels.nn.plain_names import is_compiled, unwrapped
from plora_kernels.nn.quantized.known import kind_of
from plora_kernels.nn.quantized.layer import QuantizedPLoRALinear
from plora_kernels.nn.saved_modules import TASK_HEADS

PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer that PEFT adapts: its rank, α, scale and dropout, the module it wraps, and its variant's name, if any."""

    rank: int
    alpha: float
    scale: float
    dropout: float
    base: Any
    variant: str | None


@dataclass(frozen=True)
class Layout:
    """What PEFT makes of a model; names are those of the model as it is without `torch.compile`.

    Attributes:
        layers: the adapted layers by name, in model order.
        whole: the names of the modules that are saved whole.
        shapes: the shape of every tensor of a saved adapter, by its key in the file, without embeddings.
        base_keys: the key in the model's state dict by the key that the same tensor has in a file.
        parameters: the stacked experts that PEFT adapts in place of layers, because a mixture of experts of this type
            had layers of such names for its experts before transformers 5.
    """

    layers: dict[str, AdaptedLayer]
    whole: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    base_keys: dict[str, str]
    parameters: tuple[str, ...] = ()


def layout_of(model: nn.Module, config: Any) -> Layout:
    """Return what PEFT makes of a model with a `LoraConfig`; neither of the two is changed.

    Raises:
        TargetError: PEFT itself refuses the configuration for this model, or would adapt part of a module that it also
            saves whole.
    """
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    outline = outline_of(model)
    base_keys = [key for key, value in outline.state_dict().items() if isinstance(value, Tensor)]
    config = copy.deepcopy(config)
    config.init_lora_weights = False  # no values are wanted
    if config.task_type not in TASK_HEADS:
        config.task_type = None  # it adds no module, but asks some models for methods of generation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = get_peft_model(outline, config, low_cpu_mem_usage=True)
            shapes = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        except Exception as error:  # PEFT raises many kinds, for what its configuration or the model is
            raise TargetError(f"PEFT cannot adapt the model with this configuration: {first_line(error)}") from error
    layers: dict[str, AdaptedLayer] = {}
    whole: list[str] = []
    for name, module in wrapped.get_base_model().named_modules():
        outer = next((other for other in whole if name.startswith(f"{other}.")), None)
        if isinstance(module, AuxiliaryTrainingWrapper) and outer is None:
            whole.append(name)
        elif isinstance(module, LoraLayer):
            if outer is not None:
                raise TargetError(f"PEFT would put adapters into {outer!r}, which it saves whole; leave it out of one")
            layers[name] = _describe(module)
    return Layout(
        layers=layers,
        whole=tuple(whole),
        shapes={key: tuple(value.shape) for key, value in shapes.items() if isinstance(value, Tensor)},
        base_keys={_file_key(key, layers): key for key in base_keys},
        parameters=tuple(getattr(wrapped, "targeted_parameter_names", ())),
    )


def _describe(layer: Any) -> AdaptedLayer:
    adapter = next(iter(layer.r))
    variant = layer.lora_variant.get(adapter)
    return AdaptedLayer(
        rank=int(layer.r[adapter]),
        alpha=float(layer.lora_alpha[adapter]),
        scale=float(layer.scaling[adapter]),
        dropout=float(getattr(layer.lora_dropout[adapter], "p", 0.0)),
        base=layer.get_base_layer(),
        variant=None if variant is None else type(variant).__name__,
    )


def _file_key(key: str, layers: Mapping[str, AdaptedLayer]) -> str:
    """Return the key that a tensor of the plain model has in PEFT's model: adapted layers keep it in `base_layer`."""
    owner, _, leaf = key.rpartition(".")
    return f"{PREFIX}{owner}.base_layer.{leaf}" if owner in layers else f"{PREFIX}{key}"


def exactly(name: str) -> str:
    """Return a pattern key that matches this module alone: PEFT matches keys as expressions with the end of a name."""
    return "^" + re.escape(name)


def exact_targets(targets: Iterable[str], names: Iterable[str]) -> Sequence[str] | str:
    """Return target modules that name these modules alone: their names, or where those are also ends of others' names
    (PEFT takes a name in a list for both), a regular expression."""
    wanted = list(targets)
    others = set(names) - set(wanted)
    ends = {name[position + 1 :] for name in others for position, letter in enumerate(name) if letter == "."}
    return wanted if ends.isdisjoint(wanted) else "|".join(map(re.escape, wanted))


def check_as_adapted(layers: Mapping[str, FusedPLoRALinear], layout: Layout) -> None:
    """Raise TargetError unless PEFT adapts the same layers, with the same ranks and scales."""
    for name, layer in layers.items():
        theirs = layout.layers.get(name)
        if theirs is None:
            experts = ", ".join(map(repr, layout.parameters[:2]))
            why = f": it would adapt the stacked experts {experts} instead, so leave it out" if experts else ""
            raise TargetError(f"{name!r} is adapted, but PEFT would not adapt it from the saved configuration{why}")
        if theirs.rank != layer.rank or not math.isclose(theirs.scale, layer.scale, rel_tol=1e-9):
            raise TargetError(
                f"{name!r} has rank {layer.rank} and scale {layer.scale:g}, but PEFT would give it rank {theirs.rank} "
                f"and scale {theirs.scale:g}"
            )
    for name in layout.layers.keys() - layers.keys():
        raise TargetError(f"{name!r} is not adapted, but PEFT would adapt it from the saved configuration")


# ------------------------------------------------------------------------------------------------------ outlines


def outline_of(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree whose tensors hold no memory; all other attributes are the model's own.

    `FusedPLoRALinear` layers and quantised linears are plain linears in it, as in the base model, and modules in
    `torch.compile`'s wrapper stand for themselves. A deep copy would do the same only for models whose attributes can
    all be copied.
    """
    outline = _Outliner().module(model)
    if "config" in vars(outline):
        vars(outline)["config"] = copy.copy(vars(outline)["config"])  # PEFT writes into it
    return outline


class _Outliner:
    """Copies modules and tensors, each once, so that what is shared stays shared."""

    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) not in self.modules:
            self.modules[id(module)] = self._copy(module)
        return self.modules[id(module)]

    def _copy(self, module: nn.Module) -> nn.Module:
        if is_compiled(module):
            return self.module(unwrapped(module))
        if isinstance(module, torch.jit.ScriptModule):
            return self._bare(module)
        quantized = isinstance(module, QuantizedPLoRALinear) or kind_of(module) is not None
        if isinstance(module, FusedPLoRALinear) or quantized:
            sizes: Any = module
            # PEFT asks quantised tensors for more than an outline has, and makes the same of a plain linear.
            dtype = torch.bfloat16 if quantized else None
            linear = nn.Linear(sizes.in_features, sizes.out_features, sizes.bias is not None, "meta", dtype)
            if not quantized:
                linear.weight = self.tensor(sizes.weight)
            return linear
        # Not by copy.copy: modules with parametrizations, as in wav2vec 2.0, and some others refuse that.
        outline: nn.Module = object.__new__(type(module))
        # The copy must not share the containers in which PEFT replaces modules and registers hooks.
        vars(outline).update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for registry in (outline._parameters, outline._buffers):
            registry.update({key: self.tensor(value) for key, value in registry.items() if value is not None})
        self.modules[id(module)] = outline  # before its children: a module may hold itself
        children = {key: self.module(child) for key, child in outline._modules.items() if child is not None}
        outline._modules.update(children)
        return outline

    def _bare(self, module: nn.Module) -> nn.Module:
        """Return a plain module with the same tensors and children: a scripted one cannot be copied without memory."""
        outline = nn.Module()
        for key, parameter in module.named_parameters(recurse=False):
            outline.register_parameter(key, self.tensor(parameter))
        for key, buffer in module.named_buffers(recurse=False):
            outline.register_buffer(key, self.tensor(buffer))
        for key, child in module.named_children():
            outline.add_module(key, self.module(child))
        return outline

    def tensor(self, tensor: Tensor) -> Any:
        if id(tensor) not in self.tensors:
            shape = (0,) if nn.parameter.is_lazy(tensor) else tensor.shape
            empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
            parameter = isinstance(tensor, nn.Parameter)
            self.tensors[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        return self.tensors[id(tensor)]
