"""The check of a provider's loss and gradients against float64, without which it is not timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.checks.correctness import Results, WrongResultError, check

NORMS = {"Frobenius": 2.0, "max": float("inf")}
LOSS = "loss"


class Reference:
    """The exact loss and gradients of a kind of provider, and the bounds of errors.

    The loss is held to |loss − exact| ≤ max(2·|plain − exact|, 4·eps·|exact|), as results of layers are. Every gradient
    g must satisfy, in Frobenius and in max norm, ‖g − exact‖/‖exact‖ ≤ max(2·e, 4·eps), where e is the largest such
    error that plain torch makes in any of them: of a single one it depends on luck. eps is that of the model's dtype,
    although loss and gradients are in fp32, because activations are not.

    >>> exact = {"loss": torch.tensor(2.0).double(), "a": torch.ones(2).double()}
    >>> plain = {"loss": torch.tensor(2.0), "a": torch.tensor([1.0, 1.5])}
    >>> Reference(exact, plain, torch.float32).bounds["max"]
    1.0
    """

    def __init__(self, exact: Results, plain: Results, dtype: torch.dtype) -> None:
        self.exact, self.plain, self.eps = exact, plain, torch.finfo(dtype).eps
        self.bounds = {
            norm: max(2 * max(_errors(plain, exact, order).values()), 4 * self.eps) for norm, order in NORMS.items()
        }

    def check(self, provider: str, found: Results) -> None:
        """Raise WrongResultError naming the provider, the tensor, its error and the bound."""
        if found.keys() != self.exact.keys():
            missing, more = sorted(self.exact.keys() - found.keys()), sorted(found.keys() - self.exact.keys())
            raise WrongResultError(f"{provider} gives no {missing or 'fewer results'}, and {more or 'nothing'} besides")
        check(provider, _loss_of(found), _loss_of(self.exact), _loss_of(self.plain), self.eps)
        for norm, order in NORMS.items():
            for name, error in _errors(found, self.exact, order).items():
                if not error <= self.bounds[norm]:
                    raise WrongResultError(
                        f"{provider}: the gradient {name} is off by {error:.3g} in relative {norm} norm; "
                        f"the bound is {self.bounds[norm]:.3g}"
                    )


def _loss_of(results: Results) -> Mapping[str, Tensor]:
    return {LOSS: results[LOSS]}


def _errors(found: Results, exact: Results, order: float) -> dict[str, float]:
    """Return ‖found − exact‖/‖exact‖ of each gradient; infinity if shapes differ."""
    errors = {}
    for name, value in exact.items():
        if name == LOSS:
            continue
        errors[name] = float("inf")
        if found[name].shape == value.shape:
            difference = torch.linalg.vector_norm(found[name].double() - value, order)
            errors[name] = (difference / torch.linalg.vector_norm(value, order)).item()
    return errors
