"""Frozen linears of one input, as PEFT adapts them."""

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from bench.cases import Case, Problem
from bench.checks.inputs import SIBLINGS, Siblings


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
        target_modules=list(SIBLINGS[len(weights)]),
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
