"""`fused_lora_factory`: PEFT makes fused layers itself, for adapters that are made new."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from plora_kernels.errors import PLoRAWarning


def fused_lora_factory(target: nn.Module, adapter_name: str, config: Any = None, **options: Any) -> nn.Module | None:
    """Return PEFT's LoRA layer for a linear with a fused forward, or None to leave the module to PEFT.

    It is for `LoraConfig._register_custom_module`, by which PEFT asks it for the layer of every target of a registered
    type. It declines what is not exactly `nn.Linear` or transformers' `Conv1D`, quantised linears among them, and
    parameters. PEFT does not save what was registered: a model that `from_pretrained` loads has PEFT's own layers, and
    `fuse_peft` fuses them.

    Args: those with which PEFT calls its own layers.

    Warns:
        PLoRAWarning: the installed PEFT has a LoRA layer that is not known; PEFT's own is made.

    >>> from peft import LoraConfig, get_peft_model
    >>> config = LoraConfig(r=2, target_modules=["0"])
    >>> config._register_custom_module({nn.Linear: fused_lora_factory})
    >>> type(get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).base_model.model[0]).__qualname__
    'FusedLoraLinear'
    """
    from peft.tuners.lora import layer as lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    from plora_kernels.nn.fused_peft.known_versions import why_unknown
    from plora_kernels.nn.fused_peft.layer import FusedLoraLinear

    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base) not in (nn.Linear, Conv1D) or options.get("parameter_name") is not None:
        return None
    if type(base.weight) is not nn.Parameter:  # torchao's weights are tensors of a class of their own
        return None
    unknown = why_unknown(lora.Linear)
    if unknown is not None:
        warnings.warn(f"{unknown}; fused_lora_factory leaves every layer to PEFT", PLoRAWarning, stacklevel=2)
        return None
    made: nn.Module | None
    if config is not None:
        made = lora.dispatch_default(target, adapter_name, config=config, **options)
    else:  # PEFT before 0.19 passes the configuration's values alone
        options.pop("parameter_name", None)
        transposed = type(base) is Conv1D
        if options.get("fan_in_fan_out") is not transposed or options.get("init_lora_weights") == "loftq":
            return None  # PEFT corrects the first in the configuration, and reads more of it for the second
        made = lora.Linear(target, adapter_name, is_target_conv_1d_layer=transposed, **options)
    if type(made) is lora.Linear:
        made.__class__ = FusedLoraLinear
    return made
