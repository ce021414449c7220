"""The models that adapters are put into: frozen linears of one input, plain and as PEFT adapts them."""

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from bench.cases import Case, Problem
from bench.checks.inputs import frozen_linear

# The names that models give to so many linears of one input, and for folds to those with the output's linear.
NAMES = {
    1: ("proj",),
    2: ("gate_proj", "up_proj"),
    3: ("q_proj", "k_proj", "v_proj"),
    4: ("q_proj", "k_proj", "v_proj", "o_proj"),
}


class Siblings(nn.Module):
    """Linears of one x (m, k), called one after another; returns each one's y (m, n)."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        for name, weight in zip(NAMES[len(weights)], weights, strict=True):
            self.add_module(name, frozen_linear(weight))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


def peft_siblings(
    case: Case,
    problem: Problem,
    weights: Sequence[Tensor],
    *,
    adapter_dtype: torch.dtype | None = None,
    dropout: float = 0.0,
) -> Siblings:
    """Return PEFT's own LoRA layers over `weights` with the problem's factors, by default in the weights' dtype."""
    config = LoraConfig(
        r=case.r,
        lora_alpha=problem.scale * case.r,
        lora_dropout=dropout,
        target_modules=list(NAMES[len(weights)]),
        bias="none",
    )
    siblings = get_peft_model(Siblings(weights), config, autocast_adapter_dtype=False).base_model.model
    for layer, part in zip(siblings.children(), problem.parts(), strict=True):
        for factor, values in zip(peft_factors(layer), (part.A, part.B), strict=True):
            factor.data = values.to(adapter_dtype or values.dtype, copy=True)
    return siblings.train()


def peft_factors(layer: PeftLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A (r, k) and B (n, r) of a PEFT layer."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
