"""Which quantised linears can have an adapter.

No library is imported here: a quantised module can only exist where its library was imported, so that is looked up.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from plora_kernels.errors import TargetError
from plora_kernels.nn.quantized.bitsandbytes import EightBit, FourBit
from plora_kernels.nn.quantized.kind import QuantizedKind
from plora_kernels.nn.quantized.torchao import WeightOnly
from plora_kernels.nn.replaceable import SUPPORTED, check_unhooked, class_name


def kind_of(module: nn.Module) -> QuantizedKind | None:
    """Return the kind of a quantised linear that may have an adapter, None for every other module."""
    layers: Any = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    if layers is not None and type(module) in (layers.Linear4bit, layers.LinearNF4, layers.LinearFP4):
        return FourBit()
    if layers is not None and type(module) is layers.Linear8bitLt:
        return EightBit()
    if type(module) is nn.Linear and WeightOnly.holds(module.weight):
        return WeightOnly()
    return None


def check_quantized(module: nn.Module, where: str) -> None:
    """Raise TargetError unless a QuantizedPLoRALinear can replace the module; `where` starts the message."""
    kind = kind_of(module)
    if kind is None or not isinstance(module, nn.Linear):
        raise TargetError(f"{where} a {class_name(module)}; {SUPPORTED}")
    problem = kind.problem(module)
    if problem is not None:
        raise TargetError(f"{where} a {class_name(module)} {problem}")
    check_unhooked(module, where, loads_itself=True)
