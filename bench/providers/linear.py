"""The providers of passes over one layer: forward, forward and backward, and that under LoRA dropout.

*inplace* is the fastest form of a few calls of plain torch: the library's matmul, then `addmm_`, which reads and writes
the result once more. Fused kernels have to be faster than this and than PEFT.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import plora_kernels as pk
from bench.cases import Case, Problem
from bench.checks.inputs import frozen_linear
from bench.providers.base import Maker, Provider, ProviderUnavailableError, layer_provider, named_factors
from bench.providers.dropout_masks import kept_by_call, kept_by_layer, kept_by_torch
from bench.providers.peft_layers import peft_factors, peft_siblings


def base(case: Case, problem: Problem) -> Provider:
    """The frozen matmuls alone, one after another if there are several."""
    weights = [part.weight for part in problem.parts()]
    return layer_provider(case, problem, lambda x: tuple(F.linear(x, weight) for weight in weights), {})


def _peft_autocast(case: Case, problem: Problem) -> Provider:
    """PEFT's layer as it is by default over half precision, with fp32 adapters, under autocast."""
    _require_half(case, "autocast computes in half precision")
    return _peft(case, problem, torch.float32, autocast=True)


def _peft_default(case: Case, problem: Problem) -> Provider:
    """PEFT's layer as it is by default over half precision, with fp32 adapters, for which it casts x to fp32."""
    _require_half(case, "adapters in fp32 are PEFT's default over half precision")
    return _peft(case, problem, torch.float32)


def _peft(
    case: Case, problem: Problem, adapter_dtype: torch.dtype | None = None, *, autocast: bool = False
) -> Provider:
    """PEFT's layer with adapters in the weight's dtype, or in another one, under autocast or not."""
    siblings = peft_siblings(case, problem, adapter_dtype=adapter_dtype)
    (layer,) = siblings.children()
    A, B = peft_factors(layer)

    def under_autocast(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, dtype=case.torch_dtype):
            return (layer(x),)

    call = under_autocast if autocast else lambda x: (layer(x),)
    kept = kept_by_torch(problem, A.dtype) if case.dropout_p else None
    return layer_provider(case, problem, call, named_factors([A], [B]), kept)


def _require_half(case: Case, why: str) -> None:
    if case.torch_dtype.itemsize != 2:
        raise ProviderUnavailableError(f"{why}; the case is {case.dtype}")


def _peft_compiled(case: Case, problem: Problem, adapter_dtype: torch.dtype | None = None) -> Provider:
    siblings = peft_siblings(case, problem, adapter_dtype=adapter_dtype)
    (layer,) = siblings.children()
    factors = peft_factors(layer)

    def make(compiled: Callable[[Tensor], Tensor]) -> Provider:
        kept = kept_by_call(compiled, problem, *factors) if case.dropout_p else None
        adapter = named_factors(factors[:1], factors[1:])
        return layer_provider(case, problem, lambda x: (compiled(x),), adapter, kept)

    return compiled_provider(layer, make)


def compiled_provider(module: torch.nn.Module, make: Callable[[Callable], Provider]) -> Provider:
    """Compile a module, make its provider and run that once; raises ProviderUnavailableError if that fails."""
    # Dynamo counts recompilations by code object, and every case's PEFT layer has the same one.
    torch.compiler.reset()
    try:
        provider = make(torch.compile(module, fullgraph=True))
        provider.results()
    except RuntimeError as error:  # any error of torch.compile, such as a missing C++ compiler
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ProviderUnavailableError(cause) from error
    return provider


def _inplace(case: Case, problem: Problem) -> Provider:
    factors = named_factors([problem.A.clone()], [problem.B.clone()])
    for factor in factors.values():
        factor.requires_grad_(case.op == "forward_backward")

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return (InPlaceLinear.apply(x, problem.weight, *factors.values(), problem.scale),)

    return layer_provider(case, problem, call, factors)


def _peft_default_compiled(case: Case, problem: Problem) -> Provider:
    _require_half(case, "adapters in fp32 are PEFT's default over half precision")
    return _peft_compiled(case, problem, torch.float32)


def _fused_mixed(case: Case, problem: Problem) -> Provider:
    _require_half(case, "factors in fp32 are apart from their weight's dtype over half precision")
    return _fused(case, problem, torch.float32)


def _fused(case: Case, problem: Problem, adapter_dtype: torch.dtype | None = None) -> Provider:
    layer = fused_layer(case, problem, adapter_dtype)
    kept = kept_by_layer(problem) if case.dropout_p else None
    return layer_provider(case, problem, lambda x: (layer(x),), named_factors([layer.lora_A], [layer.lora_B]), kept)


def fused_layer(case: Case, problem: Problem, adapter_dtype: torch.dtype | None = None) -> pk.FusedPLoRALinear:
    """Return this library's layer over one projection's weight, with its factors, by default in the weight's dtype."""
    layer = pk.FusedPLoRALinear.from_linear(
        frozen_linear(problem.weight),
        rank=case.r,
        alpha=problem.scale * case.r,
        dropout=case.dropout_p,
        adapter_dtype=adapter_dtype or case.torch_dtype,
    )
    layer.set_factors(problem.A, problem.B)
    return layer


LAYER: dict[str, Maker] = {
    "base": base,
    "peft": _peft,
    "peft-autocast": _peft_autocast,
    "peft-compiled": _peft_compiled,
    "inplace": _inplace,
    "fused": _fused,
}
DROPOUT: dict[str, Maker] = {name: maker for name, maker in LAYER.items() if name != "inplace"}
MIXED: dict[str, Maker] = {
    "base": base,
    "peft": _peft_default,
    "peft-autocast": _peft_autocast,
    "peft-compiled": _peft_default_compiled,
    "fused": _fused,
    "fused-mixed": _fused_mixed,
}


class InPlaceLinear(torch.autograd.Function):
    """y (M, N) = x Wᵀ + s·S Bᵀ with S = x Aᵀ (M, R); differentiable in x (M, K), A (R, K) and B (N, R)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        side = x @ A.t()
        ctx.save_for_backward(x, weight, A, B, side)
        ctx.scale = scale
        return (x @ weight.t()).addmm_(side, B.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx = dY W + s·dS A, dA = s·dSᵀ x and dB = s·dYᵀ S, with dS = dY B."""
        (grad_y,) = gradients
        x, weight, A, B, side = ctx.saved_tensors
        grad_side = (grad_y @ B).mul_(ctx.scale)
        grad_x = (grad_y @ weight).addmm_(grad_side, A)
        return grad_x, None, grad_side.t() @ x, (grad_y.t() @ side).mul_(ctx.scale), None
