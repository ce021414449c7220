"""Frozen linears of one input, as PEFT adapts them."""

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from bench.cases import Case, Problem
from bench.checks.inputs import SIBLINGS, Siblings


def peft_siblings(
    case: Case, problem: Problem, weights: Sequence[Tensor] | None = None, adapter_dtype: torch.dtype | None = None
) -> Siblings:
    """Return PEFT's own LoRA layers with the problem's factors, by default over its weights and in their dtype."""
    parts = problem.parts()
    weights = weights or [part.weight for part in parts]
    config = LoraConfig(
        r=case.r,
        lora_alpha=problem.scale * case.r,
        lora_dropout=case.dropout_p,
        target_modules=list(SIBLINGS[len(weights)]),
        bias="none",
    )
    siblings = get_peft_model(Siblings(weights), config, autocast_adapter_dtype=False).base_model.model
    for layer, part in zip(siblings.children(), parts, strict=True):
        for factor, values in zip(peft_factors(layer), (part.A, part.B), strict=True):
            factor.data = values.to(adapter_dtype or values.dtype, copy=True)
    return siblings.train()


def peft_factors(layer: PeftLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A (r, k) and B (n, r) of a PEFT layer."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
