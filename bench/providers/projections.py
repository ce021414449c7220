"""The providers of several projections of one input, such as q, k and v: one after another, compiled, in one launch."""

from collections.abc import Sequence

from torch import Tensor

import plora_kernels as pk
from bench.cases import Case, Problem
from bench.checks.inputs import Siblings, fused_siblings
from bench.providers.base import Maker, Provider, layer_provider, named_factors
from bench.providers.linear import base, compiled_provider, fused_layer
from bench.providers.peft_layers import peft_factors, peft_siblings


def _peft(case: Case, problem: Problem) -> Provider:
    siblings, factors = _peft_parts(case, problem)
    return layer_provider(case, problem, siblings, factors)


def _peft_compiled(case: Case, problem: Problem) -> Provider:
    siblings, factors = _peft_parts(case, problem)
    return compiled_provider(siblings, lambda compiled: layer_provider(case, problem, compiled, factors))


def _peft_parts(case: Case, problem: Problem) -> tuple[Siblings, dict[str, Tensor]]:
    siblings = peft_siblings(case, problem)
    As, Bs = zip(*map(peft_factors, siblings.children()), strict=True)
    return siblings, named_factors(As, Bs)


def _fused_apart(case: Case, problem: Problem) -> Provider:
    layers = [fused_layer(case, part) for part in problem.parts()]
    return layer_provider(case, problem, lambda x: tuple(layer(x) for layer in layers), _factors(layers))


def _fused(case: Case, problem: Problem) -> Provider:
    parts = problem.parts()
    factors = [(part.A, part.B) for part in parts]
    siblings, layers = fused_siblings([part.weight for part in parts], factors, problem.scale)
    return layer_provider(case, problem, siblings, _factors(layers))


def _factors(layers: Sequence[pk.FusedPLoRALinear]) -> dict[str, Tensor]:
    return named_factors([layer.lora_A for layer in layers], [layer.lora_B for layer in layers])


PROJECTIONS: dict[str, Maker] = {
    "base": base,
    "peft": _peft,
    "peft-compiled": _peft_compiled,
    "fused-apart": _fused_apart,
    "fused": _fused,
}
