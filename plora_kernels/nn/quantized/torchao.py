"""The quantised weights of torchao: tensor subclasses inside a plain `nn.Linear`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from plora_kernels.nn.quantized.kind import QuantizedKind

# Those that give the weight back by `dequantize`. `Int4Tensor` and others that are packed for one kernel do not.
CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
# What such a tensor holds if it quantises or scales x as well.
OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")


class WeightOnly(QuantizedKind):
    """int8 or int4 weights with scales for rows or groups; y is as of an `nn.Linear` with the dequantised weight."""

    name = "torchao"

    @staticmethod
    def holds(weight: object) -> bool:
        """Say whether this is a weight of a class that may have an adapter."""
        base = getattr(sys.modules.get("torchao.utils"), "TorchAOBaseTensor", None)
        return base is not None and isinstance(weight, base) and type(weight).__name__ in CLASSES

    def problem(self, module: nn.Linear) -> str | None:
        weight: Any = module.weight
        kind = type(weight).__name__
        for name in OF_ACTIVATIONS:
            if getattr(weight, name, None) is not None:
                return (
                    f"whose {kind} quantises activations as well ({name}); only weight-only quantisation is supported"
                )
        if tuple(weight.shape) != (module.out_features, module.in_features):
            return f"whose {kind} is {tuple(weight.shape)} and not (N, K)"
        return None

    def dequantize(self, module: nn.Linear, dtype: torch.dtype) -> Tensor:
        weight: Any = module.weight
        values: Tensor = weight.detach().dequantize()
        return values.to(dtype)

    def product(self, module: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor | None:
        # The other class, and scales for groups instead of rows, are dequantised by the library too.
        weight: Any = module.weight
        by_rows = type(weight).__name__ == "Int8Tensor" and weight.block_size[-1] == weight.shape[-1]
        return nn.functional.linear(x, weight, bias) if by_rows and x.dtype is weight.dtype else None

    def dtypes(self, module: nn.Linear, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        dtype = x.dtype if autocast is None else autocast
        return dtype, dtype
