"""The quantised linears of bitsandbytes: NF4 and FP4 (`Linear4bit`) and int8 (`Linear8bitLt`)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from plora_kernels.nn.quantized.kind import QuantizedKind

INT8_STEPS = 127.0  # the largest int8 number that a row's largest weight becomes


class FourBit(QuantizedKind):
    """4 bits in blocks that share a scale, which may itself be quantised ("double quantisation").

    As in bitsandbytes, products run in the layer's `compute_dtype`, or in x's dtype if none is set, and y has x's
    dtype; autocast changes neither.
    """

    name = "bitsandbytes 4-bit"

    def problem(self, module: nn.Linear) -> str | None:
        state = _state_of(module)
        if state is None or module.weight.device.type == "meta":
            return "that is not quantised yet: move it to its device first, which quantises it"
        if tuple(state.shape) != (module.out_features, module.in_features):
            return f"whose weight was quantised as {tuple(state.shape)} and not as (N, K)"
        return None

    def dequantize(self, module: nn.Linear, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = _state_of(module)
        if getattr(state, "packing_format_for_cpu", False):
            # An evaluation on CPU, before the adapter came, has repacked the weight for the library's kernel there.
            # Making a state dict is the library's way to undo that.
            module.state_dict()
            state = _state_of(module)
        values = copy.copy(state)
        values.dtype = dtype if dtype.itemsize <= 4 else torch.float32
        weight: Tensor = dequantize_4bit(module.weight.data, values)
        return weight.reshape(module.out_features, module.in_features).to(dtype)

    def survives_casts(self, module: nn.Linear) -> bool:
        return not module.weight.dtype.is_floating_point  # with quant_storage=bfloat16 pairs of bytes pass for numbers

    def product(self, module: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor | None:
        state = _state_of(module)
        nested_as_usual = not state.nested or state.state2.blocksize == 256  # the kernel knows no other
        # On CPU the library dequantises too, or repacks the weight for good, with its scales rounded to bfloat16.
        if x.device.type == "cpu" or not nested_as_usual or x.dtype.itemsize > 4:
            return None
        from bitsandbytes import matmul_4bit

        product: Tensor = matmul_4bit(x.contiguous(), module.weight.data, quant_state=state, bias=bias)
        return product

    def dtypes(self, module: nn.Linear, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        return getattr(module, "compute_dtype", None) or x.dtype, x.dtype


class EightBit(QuantizedKind):
    """int8 with a scale for each row of the weight.

    The library's product (LLM.int8) quantises x as well. Here x is not quantised: the product with the dequantised
    weight, which the library itself uses in backwards, is the more exact one.
    """

    name = "bitsandbytes int8"

    def problem(self, module: nn.Linear) -> str | None:
        if module.weight.dtype is not torch.int8 or _scales_of(module) is None:
            return "that is not quantised yet: make it with has_fp16_weights=False and move it to its device first"
        return None

    def dequantize(self, module: nn.Linear, dtype: torch.dtype) -> Tensor:
        weight, scales = module.weight.data, _scales_of(module)
        # The scales may have stayed behind when a model around the layer was moved.
        return weight.to(dtype).mul_(scales.to(weight.device)[:, None] / INT8_STEPS)


def _state_of(module: Any) -> Any:
    """Return the quantisation state of a 4-bit layer; None if it has none yet."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _scales_of(module: Any) -> Any:
    """Return the row scales (N,) of an int8 layer: the weight has them until its first pass, then the layer."""
    scales = getattr(module.weight, "SCB", None)
    return getattr(module.state, "SCB", None) if scales is None else scales
