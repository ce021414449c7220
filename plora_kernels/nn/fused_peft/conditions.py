"""Whether a call of PEFT's LoRA layer is a plain one that `plora_linear` computes; decided anew at every call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_modules
from transformers.pytorch_utils import Conv1D

from plora_kernels.checks import DTYPES, may_adapt
from plora_kernels.counter_rng import HALF
from plora_kernels.dispatch import autocast_dtype
from plora_kernels.selection import MAX_RANK

# Its forward is that of nn.Linear, written as a product of x and Wᵀ. By name, because importing the model takes time.
_FALCON = ("transformers.models.falcon.modeling_falcon", "FalconLinear")

NO_ADAPTER = "no active adapter in this layer"


class Adapter(NamedTuple):
    """One adapter of a layer: A (r, K), B (N, r), the bias of B (N,) or None, the scale and the active dropout."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    scale: float
    dropout_p: float


class Base(NamedTuple):
    """The frozen linear of a layer: W as (N, K), perhaps a transposed view, and bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None


def watched_from_outside() -> str | None:
    """Return why no call at all is plain at the moment, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch_modules._has_any_global_hook():
        return "hooks on all modules (register_module_forward_hook)"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None


def base_of(layer: Any) -> Base | str:
    """Return the layer's base, or why it is not a plain frozen linear."""
    base = layer._modules["base_layer"]
    kind = type(base)
    if kind is not nn.Linear and kind is not Conv1D and (kind.__module__, kind.__name__) != _FALCON:
        return f"its base is a {kind.__name__}"
    altered = why_altered(base, "its base")
    if altered is not None:
        return altered
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or not (bias is None or type(bias) is nn.Parameter):
        return "its base's weight is no plain parameter"
    if weight.requires_grad and torch.is_grad_enabled():
        return "its base's weight is trained"
    if weight.dim() != 2 or weight.layout is not torch.strided:
        return "its base's weight is no dense matrix"
    return Base(weight.t() if kind is Conv1D else weight, bias)


def adapters_of(layer: Any, names: Sequence[str]) -> list[Adapter] | str:
    """Return those of the named adapters that the layer has, or why one is no plain LoRA."""
    found = []
    lora_A = layer._modules["lora_A"]._modules
    for name in names:
        if name in lora_A:
            adapter = _adapter(layer, name)
            if isinstance(adapter, str):
                return adapter
            found.append(adapter)
    return found


def _adapter(layer: Any, name: str) -> Adapter | str:
    """Return one adapter of a layer, or why it is no plain LoRA."""
    if name in layer.lora_variant:
        return f"a variant of LoRA ({type(layer.lora_variant[name]).__name__})"
    down, up = layer._modules["lora_A"]._modules[name], layer._modules["lora_B"]._modules[name]
    dropout = layer._modules["lora_dropout"]._modules[name]
    for module, what in ((down, "lora_A"), (up, "lora_B")):
        if type(module) is not nn.Linear:
            return f"its {what} is a {type(module).__name__}"
        altered = why_altered(module, f"its {what}")
        if altered is not None:
            return altered
    A, B, bias = down._parameters.get("weight"), up._parameters.get("weight"), up._parameters.get("bias")
    if type(A) is not nn.Parameter or type(B) is not nn.Parameter or not (bias is None or type(bias) is nn.Parameter):
        return "its lora_A or lora_B is no plain parameter"
    if down._parameters.get("bias") is not None:
        return "its lora_A has a bias"
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        return "its lora_A and lora_B do not fit together"
    if A.shape[0] > MAX_RANK:
        return f"rank {A.shape[0]} is above {MAX_RANK}"
    scale = layer.scaling[name]
    if type(scale) not in (int, float) or not math.isfinite(scale):
        return "its scaling is no finite number"
    p: float | str = _active_dropout(dropout)
    return p if isinstance(p, str) else Adapter(A, B, bias, float(scale), p)


def _active_dropout(module: Any) -> float | str:
    """Return the probability with which a module drops elements now, or why it is no plain dropout."""
    if type(module) is nn.Identity:
        return why_altered(module, "its dropout") or 0.0
    if type(module) is not nn.Dropout:
        return f"its dropout is a {type(module).__name__}"
    altered = why_altered(module, "its dropout")
    if altered is not None:
        return altered
    if not module.training or module.p == 0:
        return 0.0
    if module.inplace:
        return "its dropout works in place"
    return float(module.p) if module.p < 1 else "its dropout drops everything"


def why_altered(module: Any, what: str) -> str | None:
    """Return why calling a module does more than its class's forward, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{what} has hooks"
    return f"{what} has a forward of its own" if "forward" in module.__dict__ else None


def why_not_fitting(x: Any, base: Base, adapters: Sequence[Adapter]) -> str | None:
    """Return why an input, a base and adapters do not fit together as `plora_linear` takes them, or None."""
    weight, bias = base
    if (type(x) is not Tensor and type(x) is not nn.Parameter) or x.layout is not torch.strided:
        return "its input is no plain tensor"
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k or not (bias is None or bias.shape == (n,)):
        return "its input or bias does not fit its base"
    device, first = x.device, adapters[0]
    if weight.device != device or not (bias is None or bias.device == device):
        return "its tensors are on several devices"
    cast = autocast_dtype(device.type)
    dtype = _after(cast, x.dtype)
    if dtype not in DTYPES or _after(cast, weight.dtype) is not dtype:
        return f"its input is {_short(x.dtype)}, its base {_short(weight.dtype)}"
    if bias is not None and _after(cast, bias.dtype) is not dtype:
        return f"its base's bias is {_short(bias.dtype)}"
    # fp32 factors beside half precision stay fp32 under autocast too: they are rounded as a kernel loads them.
    stay = weight.dtype in HALF and first.A.dtype is torch.float32
    factors = first.A.dtype if stay else _after(cast, first.A.dtype)
    for A, B, own, _, _ in adapters:
        if A.device != device or B.device != device or not (own is None or own.device == device):
            return "its tensors are on several devices"
        if A.shape[1] != k or B.shape[0] != n or not (own is None or own.shape == (n,)):
            return "its lora_A and lora_B do not fit its base"
        if A.dtype is not first.A.dtype or B.dtype is not first.A.dtype:
            return "its lora_A and lora_B are of several dtypes"
    if not may_adapt(factors, dtype):
        return f"its adapter is {_short(first.A.dtype)}, its base {_short(weight.dtype)}"
    return None


def _after(cast: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that autocast makes of one in a linear: float64 and integers stay."""
    return dtype if cast is None or not dtype.is_floating_point or dtype is torch.float64 else cast


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
