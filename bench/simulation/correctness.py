"""Whether a provider's gradients may be timed at all: every client's, held against PEFT's loop in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.correctness import WrongResultError
from bench.simulation.problem import Values

NORMS = {"Frobenius": 2.0, "max": float("inf")}


class Yardstick:
    """What the gradients are in exact arithmetic, and how far from that rounding may bring them.

    Each client's gradients count as one vector g; a provider's must satisfy, in Frobenius and in max norm,
    ‖g − exact‖/‖exact‖ ≤ max(2·e, 4·eps), e being the largest such error of PEFT's loop over the clients, at the
    precision that is measured.
    """

    def __init__(self, exact: list[Values], peft: list[Values]) -> None:
        self.exact = exact
        eps = max(torch.finfo(value.dtype).eps for value in peft[0].values())
        self.bounds = {norm: max(2 * max(_errors(peft, exact, order)), 4 * eps) for norm, order in NORMS.items()}

    def check(self, provider: str, found: list[Values]) -> None:
        """Raise WrongResultError naming the provider, the client, the error and the bound."""
        if len(found) != len(self.exact):
            raise WrongResultError(f"{provider} gives gradients of {len(found)} clients, not of {len(self.exact)}")
        for norm, order in NORMS.items():
            for client, error in enumerate(_errors(found, self.exact, order)):
                if not error <= self.bounds[norm]:
                    raise WrongResultError(
                        f"{provider}: the gradients of client {client} are off by {error:.3g} in relative {norm} norm; "
                        f"the bound is {self.bounds[norm]:.3g}"
                    )


def _errors(found: list[Values], exact: list[Values], order: float) -> list[float]:
    return [_error(one, other, order) for one, other in zip(found, exact, strict=True)]


def _error(found: Values, exact: Values, order: float) -> float:
    """Return ‖found − exact‖/‖exact‖ of all values as one vector; infinity where names or shapes differ."""
    if found.keys() != exact.keys() or any(found[name].shape != value.shape for name, value in exact.items()):
        return float("inf")
    difference = _norm([found[name].double() - value for name, value in exact.items()], order)
    return (difference / _norm(list(exact.values()), order)).item()


def _norm(tensors: list[Tensor], order: float) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, order) for t in tensors]), order)
