"""Problems of fp32 factors beside half precision: drawn, rounded as kernels round them, checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.support.groups import GroupedProblem
from tests.support.numerics import NAMES, assert_within_bound, run


def widened(problem: Any) -> Any:
    """Return a problem of half precision with factors of fp32 that rounding gives those of the problem, or nearly."""
    generator = torch.Generator().manual_seed(problem.lora_A.numel())
    if isinstance(problem, GroupedProblem):
        return replace(problem, problems=[widened(one) for one in problem.problems])

    def wide(factor: Tensor) -> Tensor:
        noise = torch.rand(factor.shape, generator=generator).to(factor.device) - 0.5
        return factor.float() * (1 + torch.finfo(factor.dtype).eps * noise)

    return replace(problem, lora_A=wide(problem.lora_A), lora_B=wide(problem.lora_B))


def rounded(problem: Any) -> Any:
    """Return a problem with its factors rounded to x's dtype."""
    if isinstance(problem, GroupedProblem):
        return replace(problem, problems=[rounded(one) for one in problem.problems])
    dtype = problem.x.dtype
    return replace(problem, lora_A=problem.lora_A.to(dtype), lora_B=problem.lora_B.to(dtype))


def check_mixed(problem: Any) -> None:
    """Check that results are within the bound of rounded factors, and that dA and dB are in fp32."""
    same = rounded(problem)
    exact, variances = same.reference_results(torch.float64), same.variances()
    for name, result, truth, variance in zip(NAMES, run(problem), exact, variances, strict=True):
        if result is not None:
            assert result.dtype is (torch.float32 if name in ("dA", "dB") else problem.x.dtype), name
            assert_within_bound(result, truth, variance, name)


def assert_rounded_once(result: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> None:
    """Assert that `result` is W + s·B A, exact to half a spacing of its dtype and what a sum in fp32 is off.

    A product of two fp32 numbers by three of tf32 parts keeps 22 bits.
    """
    exact = weight.double() + scale * lora_B.double() @ lora_A.double()
    summed = abs(scale) * lora_B.double().abs() @ lora_A.double().abs()
    spacing = torch.finfo(result.dtype).eps * 2 ** exact.abs().clamp_min(2.0**-14).log2().floor()
    assert ((result.double() - exact).abs() <= spacing / 2 + 2.0**-21 * summed + 1e-7).all()
