"""PEFT's LoRA layers for tests of their fused form: how one is made, what it computes, how far two results may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import plora_kernels as pk

K, N = 37, 29
BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(K, N),
    "no bias": lambda: nn.Linear(K, N, bias=False),
    "Conv1D": lambda: Conv1D(N, K),
}


def lora_model(base: str = "linear", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Return a PeftModel of one layer, `layer_of` it, with adapter "default" whose B is not zero."""
    torch.manual_seed(0)
    options = {"r": 5, "lora_alpha": 7, "target_modules": ["0"], "init_lora_weights": False, **options}
    options.setdefault("fan_in_fan_out", base == "Conv1D")
    model: nn.Module = get_peft_model(nn.Sequential(BASES[base]().to(dtype)), LoraConfig(**options))
    return model


def layer_of(model: nn.Module) -> Any:
    """Return the LoRA layer of `lora_model`."""
    return model.base_model.model[0]


def computed(model: nn.Module, x: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Return y, dx and the gradient of every parameter, of a fixed output gradient."""
    leaf = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(leaf, **arguments)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": leaf.grad, **found}


def reasons(model: nn.Module) -> set[str]:
    """Return why PEFT's forward computed calls of the model's layers since they were fused."""
    return {reason for layer in pk.fuse_peft(model).layers for reason in layer.calls if reason != "fused"}


def fused_calls(model: nn.Module) -> int:
    """Return how many calls were fused."""
    return sum(layer.calls.get("fused", 0) for layer in pk.fuse_peft(model).layers)


def assert_as_exact(
    found: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor], products: torch.dtype
) -> None:
    """Assert that results are within twice PEFT's error, or within 4·eps of the products' dtype, of exact ones.

    Errors are relative, in Frobenius norm and in max norm. All three have the same names and shapes; `found` and
    `theirs` have the same dtypes.
    """
    assert found.keys() == theirs.keys() == exact.keys()
    for name, ours in found.items():
        assert (ours.dtype, ours.shape) == (theirs[name].dtype, theirs[name].shape), name
        for norm in (torch.linalg.vector_norm, _largest):
            size = norm(exact[name]).item()
            error, known = (norm(result[name].double() - exact[name]).item() for result in (found, theirs))
            assert error <= max(2 * known, 4 * torch.finfo(products).eps * size), f"{name}: {error / size:.3g}"


def _largest(tensor: Tensor) -> Tensor:
    return tensor.abs().max() if tensor.numel() else tensor.new_zeros(())


def stirred(model: nn.Module, names: Sequence[str] = ("lora_",), seed: int = 1, std: float = 0.2) -> nn.Module:
    """Return the model with normal numbers in the parameters whose names hold one of `names`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
