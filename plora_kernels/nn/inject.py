"""Put `FusedPLoRALinear` into a model by module names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from plora_kernels.checks import DTYPES
from plora_kernels.errors import StateError, TargetError
from plora_kernels.nn.call_watch import CallWatch
from plora_kernels.nn.config import PLoRAConfig
from plora_kernels.nn.injected import Injected
from plora_kernels.nn.layer_errors import naming
from plora_kernels.nn.linear import FusedPLoRALinear
from plora_kernels.nn.plain_names import is_compiled
from plora_kernels.nn.quantized.known import kind_of
from plora_kernels.nn.quantized.layer import QuantizedPLoRALinear
from plora_kernels.nn.saved_modules import modules_saved_whole
from plora_kernels.nn.shared_input import SiblingPLoRALinear, find_siblings
from plora_kernels.nn.storages import storage_of, storage_uses
from plora_kernels.nn.targets import find_targets, nearest


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
    named = model.named_parameters(remove_duplicate=False)  # a tied one may have a parameter of its own later
    required_grad = {name: parameter.requires_grad for name, parameter in named}
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
        with naming(name):
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
