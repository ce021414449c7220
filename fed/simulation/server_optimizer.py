"""The server's optimiser: plain averaging, or Adam on the factors with the round's mean change as its gradient."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fed.config.training import ServerConfig
from fed.types import Factors, ServerState


def step(server: ServerState, following: ServerState, settings: ServerConfig) -> ServerState:
    """Return the server's state after its optimiser's step, given the state `following` that the method aggregated.

    "fedavg" returns `following` as it is. "fedadam": for every A and B, with x from `server`, the mean from `following`
    and Δ = mean − x, it takes m ← β₁ m + (1 − β₁) Δ, v ← β₂ v + (1 − β₂) Δ², x ← x + η m / (√v + τ), all in fp64 and
    rounded once. A module with Δ = 0, such as one that no client trained, keeps its value and moments. Head and base
    are those of `following`.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295.
    """
    if settings.optimizer == "fedavg":
        return following
    factors: dict[str, Factors] = {}
    moments = dict(server.moments)
    for matrix, before in server.adapter.factors.items():
        moved = []
        for side, old, mean in zip("AB", before, following.adapter.factors[matrix], strict=True):
            first, second, modules = f"first {side} {matrix}", f"second {side} {matrix}", "AB".index(side)
            sides = old.movedim(modules, 0), mean.movedim(modules, 0)
            value, moments[first], moments[second] = _adam(*sides, moments.get(first), moments.get(second), settings)
            moved.append(value.movedim(0, modules).contiguous())
        factors[matrix] = (moved[0], moved[1])
    return replace(following, adapter=replace(following.adapter, factors=factors), moments=moments)


def _adam(
    old: Tensor, mean: Tensor, first: Tensor | None, second: Tensor | None, settings: ServerConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factor after one Adam step and its two moments; the first axis counts the modules."""
    gradient = mean.double() - old.double()
    first = torch.zeros_like(gradient) if first is None else first
    second = torch.zeros_like(gradient) if second is None else second
    idle = (gradient == 0).all(1, keepdim=True)
    first = first.where(idle, settings.beta1 * first + (1 - settings.beta1) * gradient)
    second = second.where(idle, settings.beta2 * second + (1 - settings.beta2) * gradient.square())
    value = old.double() + settings.step_size * first / (second.sqrt() + settings.tau)
    return old.where(idle, value.to(old.dtype)), first, second
