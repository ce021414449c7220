"""Quantised models for tests, and a stand-in for bitsandbytes where that is not installed."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Linear8bitLt(nn.Linear):
    """An int8 linear that holds its weight and scales where bitsandbytes' layer of this name does."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        scales = self.weight.data.abs().amax(1)
        values = (self.weight.data / scales[:, None] * 127).round().to(torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.state = SimpleNamespace(SCB=scales)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, dequantized(self).to(x.dtype), self.bias)


def dequantized(linear: Linear8bitLt) -> Tensor:
    """Return the weight (N, K) of the stand-in."""
    return linear.weight.data.float() * (linear.state.SCB / 127)[:, None]


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-in pass for bitsandbytes' int8 layer."""
    import sys

    library = ModuleType("bitsandbytes")
    names = {name: type(name, (nn.Linear,), {}) for name in ("Linear4bit", "LinearNF4", "LinearFP4")}
    library.nn = SimpleNamespace(Linear8bitLt=Linear8bitLt, **names)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)


def quantized_4bit(bnb: Any, linear: nn.Linear, **options: Any) -> nn.Linear:
    """Return bitsandbytes' 4-bit layer with a linear's weight and bias, quantised on the CPU."""
    sizes = linear.in_features, linear.out_features
    made = bnb.nn.Linear4bit(*sizes, bias=linear.bias is not None, **options)
    kept = {name: getattr(made.weight, name) for name in ("compress_statistics", "quant_type", "quant_storage")}
    made.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, module=made, **kept)
    return _with_bias(made, linear).to("cpu")


def quantized_8bit(bnb: Any, linear: nn.Linear, **options: Any) -> nn.Linear:
    """Return bitsandbytes' int8 layer with a linear's weight and bias, quantised on the CPU."""
    sizes = linear.in_features, linear.out_features
    made = bnb.nn.Linear8bitLt(*sizes, bias=linear.bias is not None, has_fp16_weights=False, **options)
    made.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return _with_bias(made, linear).to("cpu")


def _with_bias(made: nn.Linear, linear: nn.Linear) -> nn.Linear:
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.data.clone())
    return made.train(linear.training)
