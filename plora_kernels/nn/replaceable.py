"""Which modules a `FusedPLoRALinear` can replace without changing what the model computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plora_kernels.checks import DTYPES
from plora_kernels.errors import TargetError

SUPPORTED = (
    "quantised weights are supported of bitsandbytes (4 and 8 bits) and torchao (int8 and int4, weight-only) alone: "
    "pip install plora-kernels[quantized]"
)


def check_replaceable(module: nn.Module, where: str) -> None:
    """Raise TargetError unless a FusedPLoRALinear can replace the module: a plain nn.Linear without hooks.

    Its weight has to be a plain dense parameter (N, K) in fp16, bf16, fp32 or fp64. `where` is the start of the
    message, such as "from_linear got" or "target module 'q_proj' is".
    """
    dtype = unsupported_dtype(module)
    if dtype is not None:
        raise TargetError(
            f"{where} a {class_name(module)} that holds {dtype}; {SUPPORTED}; otherwise load the model in bf16, "
            "fp16 or fp32"
        )
    if type(module) is not nn.Linear:
        raise TargetError(f"{where} a {class_name(module)}; only a plain nn.Linear can be replaced")
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        raise TargetError(f"{where} an nn.Linear whose weight is computed (weight_norm?); a parameter is needed")
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        kind = "sparse tensor" if type(weight) is nn.Parameter else type(weight).__name__
        raise TargetError(
            f"{where} an nn.Linear whose weight is a {kind}; a plain dense parameter is needed: inject before the "
            f"model is sharded; if it is quantised, {SUPPORTED}"
        )
    if weight.shape != (module.out_features, module.in_features):
        raise TargetError(
            f"{where} an nn.Linear whose weight is {tuple(weight.shape)} and not (N, K) = "
            f"{(module.out_features, module.in_features)}; inject before the weight is partitioned or packed"
        )
    check_unhooked(module, where)


def check_unhooked(module: nn.Module, where: str, loads_itself: bool = False) -> None:
    """Raise TargetError if a linear has a forward of its own or hooks; if it `loads_itself`, hooks of that may stay."""
    if "forward" in vars(module):
        raise TargetError(f"{where} an nn.Linear with a forward of its own (accelerate's hooks?); remove it first")
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks),
        *(module._state_dict_hooks, module._state_dict_pre_hooks),
        *(() if loads_itself else (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks)),
    )
    if any(hooks):
        raise TargetError(f"{where} an nn.Linear with hooks, which would be lost; remove them first")


def unsupported_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of a linear's own tensors in which nothing can be adapted, such as int8 or fp8; None for others.

    A linear is here an nn.Linear, or a module that gives its sizes as one does: quantised ones often are no nn.Linear.
    """
    tensors: list[Tensor] = []
    if isinstance(module, nn.Linear):
        tensors = [module.weight] if isinstance(module.weight, Tensor) else []
    elif any(all(isinstance(getattr(module, size, None), int) for size in sizes) for sizes in _SIZES):
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        weight: Any = getattr(module, "weight", None)
        if type(module).__module__.startswith("torch.ao.") and callable(weight):
            tensors.append(weight())  # torch's own quantised layers unpack it
    return next((tensor.dtype for tensor in tensors if tensor.dtype not in DTYPES), None)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, with where it is from if torch's nn.Linear has the same name."""
    kind = type(module)
    alike = kind.__name__ == "Linear" and kind is not nn.Linear
    return f"{kind.__module__}.{kind.__name__}" if alike else kind.__name__


# The names by which linear layers of several libraries give K and N.
_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))
