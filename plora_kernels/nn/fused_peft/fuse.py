"""`fuse_peft` and `unfuse_peft`: swap the class of a model's LoRA layers between PEFT's own and the fused ones."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import nn

from plora_kernels.errors import PLoRAWarning, StateError, TargetError
from plora_kernels.nn.fused_peft.calls import calls_of, forget_calls
from plora_kernels.nn.fused_peft.report import FusionReport, LayerStatus
from plora_kernels.nn.linear import FusedPLoRALinear


def fuse_peft(model: nn.Module) -> FusionReport:
    """Let the LoRA layers of a PEFT model compute in one fused pass, in place, and return a report that prints a table.

    Nothing but the time changes: the same parameters, names, state dict, optimiser and file formats, so that a
    `PeftModel`, a `Trainer`, a checkpoint or `disable_adapter`, `merge_and_unload` and several adapters go on as
    before. Each `peft.tuners.lora.Linear`, and each `ParamWrapper` of stacked experts, gets a fused forward; whether a
    call is a plain one is decided at every call, and PEFT's own forward computes those that are not.

    Over a base in half precision fp32 adapters are rounded to its dtype as they enter the products, and LoRA dropout
    draws other masks than PEFT's from the same generator. Otherwise results are PEFT's up to the rounding of a sum.

    Args:
        model: a `PeftModel`, or any module with LoRA layers of PEFT in it, as transformers' `load_adapter` or
            `inject_adapter_in_model` make them. Layers that were added since the last call are fused as well.

    Raises:
        TargetError: the model has no LoRA layer of PEFT.

    Warns:
        PLoRAWarning: the installed PEFT has a kind of LoRA layer that is not known; all of that kind stay PEFT's own.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    >>> print(fuse_peft(model))
    1 of 1 LoRA layers fused
    layers              count  computed by  why
    base_model.model.0      1  fused
    """
    _check_has_layers(model)
    from plora_kernels.nn.fused_peft.known_versions import why_unknown

    classes, unknown = _fused_classes(), list[str]()
    found = [module for module in model.modules() if type(module) in classes]
    for kind in dict.fromkeys(map(type, found)):
        reason = why_unknown(kind)
        if reason is not None:
            unknown.append(reason)
            del classes[kind]
    if unknown:
        warnings.warn(f"{'; '.join(unknown)}; fuse_peft leaves these layers to PEFT", PLoRAWarning, stacklevel=2)
    for module in found:
        module.__class__ = classes.get(type(module), type(module))
    return FusionReport(model, _read)


def unfuse_peft(model: nn.Module) -> int:
    """Give the LoRA layers of a model PEFT's own forward back, in place, and return how many were fused.

    Raises:
        StateError: no layer of the model is fused.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    >>> _ = fuse_peft(model)
    >>> unfuse_peft(model)
    1
    """
    own = {fused: own for own, fused in _fused_classes().items()} if "peft" in sys.modules else {}
    found = [module for module in model.modules() if type(module) in own]
    if not found:
        raise StateError("no LoRA layer of the model is fused; fuse_peft(model) fuses them")
    for module in found:
        module.__class__ = own[type(module)]
        forget_calls(module)
    return len(found)


def _fused_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Return the fused class for each of PEFT's classes. Subclasses of these, for quantised weights, stay PEFT's."""
    from peft.tuners import lora

    from plora_kernels.nn.fused_peft.experts import FusedParamWrapper
    from plora_kernels.nn.fused_peft.layer import FusedLoraLinear

    return {lora.Linear: FusedLoraLinear, lora.ParamWrapper: FusedParamWrapper}


def _check_has_layers(model: nn.Module) -> None:
    """Raise TargetError unless the model has LoRA layers of PEFT."""
    if not isinstance(model, nn.Module):
        raise TargetError(f"fuse_peft got a {type(model).__name__}; a model with PEFT's LoRA layers is needed")
    tuners = set()
    if "peft" in sys.modules:  # no layer of PEFT exists before it is imported
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, LoraLayer) for module in model.modules()):
            return
        tuners = {type(module).__module__ for module in model.modules() if isinstance(module, BaseTunerLayer)}
    if any(isinstance(module, FusedPLoRALinear) for module in model.modules()):
        raise TargetError("the model's adapters are this library's own, from inject or load_peft, and fused already")
    if tuners:
        raise TargetError(f"the model's adapters are of {', '.join(sorted(tuners))}; only LoRA layers can be fused")
    raise TargetError(
        "the model has no LoRA layer of PEFT: call peft.get_peft_model first, or plora_kernels.inject on a plain model"
    )


def _read(model: nn.Module) -> list[LayerStatus]:
    """Return the status of the model's LoRA layers."""
    from peft.tuners.lora import LoraLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    return [LayerStatus(name, _peft_name(module), _why(module), calls_of(module)) for name, module in layers]


def _peft_name(layer: nn.Module) -> str:
    """Return the name of PEFT's class of a layer, fused or not."""
    own = {fused: own for own, fused in _fused_classes().items()}
    return own.get(type(layer), type(layer)).__name__


def _why(layer: Any) -> str | None:
    """Return why PEFT's forward would compute a call of the layer now, or None."""
    from plora_kernels.nn.fused_peft.experts import FusedParamWrapper, why_not_experts
    from plora_kernels.nn.fused_peft.known_versions import why_unknown
    from plora_kernels.nn.fused_peft.layer import FusedLoraLinear, why_not

    if "forward" in vars(layer) and getattr(vars(layer)["forward"], "__func__", None) is not type(layer).forward:
        return "it has a forward of its own"
    if type(layer) is FusedLoraLinear:
        return why_not(layer)
    if type(layer) is FusedParamWrapper:
        return why_not_experts(layer)
    if type(layer) in _fused_classes():
        return why_unknown(type(layer)) or "not fused: call fuse_peft again"
    return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__} has no fused form"
