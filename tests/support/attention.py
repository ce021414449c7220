"""Three projections of one input, with adapters, fused or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import plora_kernels as pk
from tests.support.models import adapted


class Attention(nn.Module):
    """Three projections of different widths, as of grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(7, 6), nn.Linear(7, 3, bias=False), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x).square().sum(-1) + self.k_proj(x).sin().sum(-1) * self.v_proj(x).sum(-1)


NAMES = ("q_proj", "k_proj", "v_proj")


def make(fused: bool, dtype: torch.dtype = torch.float64) -> tuple[Attention, pk.Injected]:
    """Return the projections with adapters of their own ranks and scales; the same each time, fused or not."""
    torch.manual_seed(0)
    model = Attention().to(dtype)
    patterns = {"rank_pattern": {"k_proj": 2, "v_proj": 5}, "alpha_pattern": {"v_proj": 8.0}}
    return model, adapted(model, NAMES, alpha=3.0, fuse_projections=fused, **patterns)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]
