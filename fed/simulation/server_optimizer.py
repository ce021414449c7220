"""The server's own step: plain averaging, or Adam on the factors with the round's movement as its gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fed.types import Factors, ServerState

if TYPE_CHECKING:
    from fed.config.training import ServerConfig


def step(server: ServerState, following: ServerState, settings: ServerConfig) -> ServerState:
    """Return the state the server goes on with, given what its method made of the round.

    "fedavg" is the method's own result. "fedadam": with Δ = mean − x for every A and B,
    m ← β₁ m + (1 − β₁) Δ, v ← β₂ v + (1 − β₂) Δ², x ← x + η m / (√v + τ), all in fp64 and rounded once. A module
    nobody moved keeps its value and its moments. Head and base are the method's.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295.
    """
    if settings.optimizer == "fedavg":
        return following
    factors: dict[str, Factors] = {}
    moments = dict(server.moments)
    for matrix, before in server.adapter.factors.items():
        moved = []
        for side, old, mean in zip("AB", before, following.adapter.factors[matrix], strict=True):
            key, modules = f"{side} {matrix}", 0 if side == "A" else 1
            value, first, second = _adam(
                old.movedim(modules, 0),
                mean.movedim(modules, 0),
                moments.get(f"first {key}"),
                moments.get(f"second {key}"),
                settings,
            )
            moments[f"first {key}"], moments[f"second {key}"] = first, second
            moved.append(value.movedim(0, modules).contiguous())
        factors[matrix] = (moved[0], moved[1])
    return replace(following, adapter=replace(following.adapter, factors=factors), moments=moments)


def _adam(
    old: Tensor, mean: Tensor, first: Tensor | None, second: Tensor | None, settings: ServerConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moved factor and its moments, module by module along the first axis."""
    gradient = mean.double() - old.double()
    first = torch.zeros_like(gradient) if first is None else first
    second = torch.zeros_like(gradient) if second is None else second
    idle = (gradient == 0).all(1, keepdim=True)
    first = first.where(idle, settings.beta1 * first + (1 - settings.beta1) * gradient)
    second = second.where(idle, settings.beta2 * second + (1 - settings.beta2) * gradient.square())
    value = old.double() + settings.step_size * first / (second.sqrt() + settings.tau)
    return old.where(idle, value.to(old.dtype)), first, second
