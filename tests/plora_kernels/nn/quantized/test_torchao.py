"""Layers over torchao's int8 and int4 weights, held against PEFT's and against `nn.Linear` itself."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import plora_kernels as pk

EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def config_of(torchao: Any, kind: str) -> Any:
    from torchao.quantization import PerAxis, PerGroup

    return {
        "int8": lambda: torchao.Int8WeightOnlyConfig(),
        "int8 in groups": lambda: torchao.IntxWeightOnlyConfig(torch.int8, PerGroup(32)),
        "int4 in groups": lambda: torchao.IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        "int4 by rows": lambda: torchao.IntxWeightOnlyConfig(torch.int4, PerAxis(0)),
    }[kind]()


def quantized(torchao: Any, kind: str, dtype: torch.dtype, model: nn.Module | None = None) -> nn.Module:
    model = nn.Sequential(nn.Linear(128, 96)).to(dtype) if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(model, config_of(torchao, kind))
    return model


@pytest.mark.parametrize("kind", ["int8", "int8 in groups", "int4 in groups", "int4 by rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 70])
def test_it_is_as_exact_as_peft(torchao: Any, kind: str, dtype: torch.dtype, rows: int) -> None:
    model = quantized(torchao, kind, dtype)
    weight, bias = model[0].weight.dequantize().double(), model[0].bias.detach().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(
            quantized(torchao, kind, dtype, _same(model[0], weight)),
            LoraConfig(r=8, lora_alpha=16, target_modules=["0"]),
        )
    peft = wrapped.base_model.model[0]
    assert type(peft).__name__ == "TorchaoLoraLinear"
    torch.testing.assert_close(peft.base_layer.weight.dequantize().double(), weight, rtol=0.02, atol=0.02)
    handle = pk.inject(model, pk.PLoRAConfig(rank=8, alpha=16.0, target_modules="all-linear"))
    layer = handle.layers["0"]
    assert layer.lora_A.dtype is torch.float32
    A, B = torch.randn(8, 128) / 128**0.5, torch.randn(96, 8) / 4
    layer.set_factors(A, B)
    with torch.no_grad():
        peft.lora_A.default.weight.copy_(A)
        peft.lora_B.default.weight.copy_(B)
    x, dy = torch.randn(rows, 128).to(dtype), torch.randn(rows, 96).to(dtype)
    errors = []
    for module, factors in (
        (layer, (layer.lora_A, layer.lora_B)),
        (peft, (peft.lora_A.default.weight, peft.lora_B.default.weight)),
    ):
        own = module.base_layer.weight.dequantize().double()
        x64, A64, B64, dy64 = x.double(), A.double(), B.double(), dy.double()
        s, ds = x64 @ A64.T, dy64 @ B64
        want = [
            x64 @ own.T + bias + 2.0 * s @ B64.T, dy64 @ own + 2.0 * ds @ A64, 2.0 * ds.T @ x64, 2.0 * dy64.T @ s
        ]  # fmt: skip
        given = x.clone().requires_grad_()
        y = module(given)
        assert y.dtype is dtype
        found = [y, *torch.autograd.grad(y, [given, *factors], dy)]
        errors.append([((t.double() - e).norm() / e.norm()).item() for t, e in zip(found, want, strict=True)])
    for name, ours, of_peft in zip(("y", "dx", "dA", "dB"), *errors, strict=True):
        assert ours <= max(2 * of_peft, EPS[dtype]), f"{name}: {ours:.3g} against PEFT's {of_peft:.3g}"


def _same(linear: nn.Linear, weight: Tensor) -> nn.Module:
    made = nn.Linear(linear.in_features, linear.out_features).to(linear.weight.dtype)
    made.weight, made.bias = nn.Parameter(weight.to(linear.weight.dtype)), nn.Parameter(linear.bias.detach().clone())
    return nn.Sequential(made)


@pytest.mark.parametrize("kind", ["int8", "int4 in groups"])
def test_selections_copies_state_dicts_and_restoring(torchao: Any, kind: str) -> None:
    model = quantized(torchao, kind, torch.bfloat16)
    base, x = model[0], torch.randn(20, 128).bfloat16()
    plain = model(x)
    handle = pk.inject(model, pk.PLoRAConfig(rank=4, target_modules=["0"]))
    nn.init.normal_(handle.layers["0"].lora_B)
    with pytest.raises(pk.StateError, match=r"quantised \(torchao\).*select with unselected='frozen'"):
        handle.select([1])
    handle.select([1, 3], unselected="frozen")
    y = model(x)
    y.sum().backward()
    assert torch.equal(copy.deepcopy(model)(x), y)
    state = copy.deepcopy(model.state_dict())
    assert set(state) == {"0.weight", "0.bias", "0.lora_A", "0.lora_B"}
    handle.layers["0"].unfold()
    handle.layers["0"].reset_adapter()
    model.load_state_dict(state)
    assert torch.equal(model(x), y)
    other = quantized(torchao, kind, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"'0.weight' is not what the quantised layer holds"):
        model.load_state_dict(state | {"0.weight": other[0].weight})
    assert handle.restore()[0] is base
    torch.testing.assert_close(model(x), plain)


def test_autocast_and_other_dtypes_are_as_of_a_linear(torchao: Any) -> None:
    model = quantized(torchao, "int4 in groups", torch.float32)
    weight, bias = model[0].weight.dequantize(), model[0].bias.detach()
    layer = pk.inject(model, pk.PLoRAConfig(rank=4, target_modules=["0"])).layers["0"]
    x = torch.randn(20, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, nn.functional.linear(x, weight, bias))
    assert y.dtype is torch.bfloat16


def test_what_is_quantised_otherwise_is_refused_by_name(torchao: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic, eight = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64).bfloat16())
        torchao.quantize_(dynamic, torchao.Int8DynamicActivationInt8WeightConfig())
        torchao.quantize_(eight, torchao.Float8WeightOnlyConfig())
    for model, message in (
        (dynamic, "a Linear whose Int8Tensor quantises activations as well"),
        (eight, "an nn.Linear whose weight is a Float8Tensor; .* quantised weights are supported of"),
    ):
        for targets in ("all-linear", ["0"]):
            with pytest.raises(pk.TargetError, match=f"'0' is {message}"):
                pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=targets))
