"""The candidate that decodes NF4 in its main loop, interpreted, against a weight decoded in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.audit.nf4_matmul import BLOCK, nf4_matmul


def decoded(packed: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """Return the weight (N, K): even columns lie in the high nibbles."""
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).long()
    return code[nibbles] * scales.repeat_interleave(BLOCK, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64, 5, 1), (37, 192, 70, 5), (40, 128, 33, 24)], ids=str)
@pytest.mark.usefixtures("nan_filled")
def test_it_multiplies_by_the_decoded_weight_and_adds_the_side_branch(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    m, k, n, r = shape
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales, code = torch.rand(n, k // BLOCK) + 0.1, torch.linspace(-1, 1, 16) ** 3
    x, side, lora_B = torch.randn(m, k).to(dtype), torch.randn(m, r).to(dtype), torch.randn(n, r)
    y = nf4_matmul(x, packed, scales, code, side, lora_B, 0.5, block_m=16, block_n=32)
    weight, up = decoded(packed, scales, code).to(dtype).double(), (lora_B * 0.5).to(dtype).double()
    exact = x.double() @ weight.T + side.double() @ up.T
    eps = torch.finfo(dtype).eps
    assert (y.double() - exact).norm() <= 2 * eps * exact.norm() + eps
    assert torch.isfinite(y).all()
