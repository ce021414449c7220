"""The check of a provider's results against fp64, without which it is not timed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import BACKWARD, DROPOUT_P, FOLDS, Case, Problem

Results = Mapping[str, Tensor]


class WrongResultError(Exception):
    """A provider's result that is too far from the fp64 reference; nothing of its case is timed."""


@dataclass(frozen=True, eq=False)
class Expected:
    """The results that a provider must give, with the adapter or without.

    `kept` (m, k) bool is what dropout leaves the adapter of x; None drops nothing.
    """

    adapted: bool
    kept: Tensor | None = None


WITHOUT_ADAPTER, WITH_ADAPTER = Expected(adapted=False), Expected(adapted=True)


def plain_results(
    case: Case, problem: Problem, dtype: torch.dtype, *, adapted: bool, kept: Tensor | None = None
) -> Results:
    """Return a case's results by plain torch at `dtype`; `adapted=False` leaves the adapter out.

    For each projection y (m, n) = x Wᵀ + scale·(D(x) Aᵀ) Bᵀ, D(x) = x ⊙ kept/(1 − p) or x; where the case has a
    backward also the gradients of Σ⟨y, grad_y⟩, that is dx (m, k) and, where adapted, dA (r, k) and dB (n, r) of each.
    Folds: each weight (n, k) = W + scale·B A.
    """
    parts = problem.parts()
    weights = [part.weight.to(dtype) for part in parts]
    factors = [(part.A.to(dtype, copy=True), part.B.to(dtype, copy=True)) for part in parts]
    if case.op in FOLDS:
        updates = [problem.scale * (B @ A) if adapted else 0 for A, B in factors]
        return numbered("weight", [weight + update for weight, update in zip(weights, updates, strict=True)])
    x = problem.x.to(dtype, copy=True)
    leaves = {"dx": x}
    if adapted:
        leaves |= numbered("dA", [A for A, _ in factors]) | numbered("dB", [B for _, B in factors])
    for leaf in leaves.values():
        leaf.requires_grad_(case.op in BACKWARD)
    dropped = x if kept is None else x * kept.to(dtype).mul_(1 / (1 - DROPOUT_P))
    ys = [F.linear(x, weight) for weight in weights]
    if adapted:
        ys = [y + problem.scale * F.linear(F.linear(dropped, A), B) for y, (A, B) in zip(ys, factors, strict=True)]
    outputs = numbered("y", [y.detach() for y in ys])
    if case.op not in BACKWARD:
        return outputs
    gradients = torch.autograd.grad(ys, list(leaves.values()), [part.grad_y.to(dtype) for part in parts])
    return outputs | dict(zip(leaves, gradients, strict=True))


def references(case: Case, problem: Problem, expected: Expected) -> tuple[Results, Results]:
    """Return what is expected in fp64 and, for the bound, by plain torch at the case's dtype."""
    exact, plain = (
        plain_results(case, problem, dtype, adapted=expected.adapted, kept=expected.kept)
        for dtype in (torch.float64, case.torch_dtype)
    )
    return exact, plain


def numbered(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name a result; for several projections with its number."""
    if len(tensors) == 1:
        return {name: tensors[0]}
    return {f"{name} {number}": tensor for number, tensor in enumerate(tensors)}


def check(provider: str, results: Results, exact: Results, plain: Results, eps: float | None = None) -> None:
    """Refuse results whose error is more than twice that of plain torch at the same dtype.

    For every tensor, in max and in Frobenius norm,
    ‖result − exact‖ ≤ max(2·‖plain − exact‖, 4·eps·max|exact|), eps of the dtype unless one is given (tf32's has none).
    Raises WrongResultError naming the provider, the tensor, its error and the bound. Of tensors
    without storage only names and sizes are compared.

    Tests derive their bound from the roundings instead (`tests/support/numerics.py`), because on their small problems
    plain torch's error depends on luck and on the order in which a processor sums. Here sums are long and results many,
    so neither matters, and K far exceeds R, so adding R terms to y costs no precision. Plain torch on the same device,
    with its settings there, is what a provider replaces.
    """
    if results.keys() != exact.keys():
        raise WrongResultError(f"{provider} gives {sorted(results)}; the case needs {sorted(exact)}")
    for name, expected in exact.items():
        if results[name].shape != expected.shape:
            got, wanted = tuple(results[name].shape), tuple(expected.shape)
            raise WrongResultError(f"{provider}: {name} is {got}; the case needs {wanted}")
        if expected.is_meta:
            continue
        floor = 4 * (eps or torch.finfo(plain[name].dtype).eps) * expected.abs().max().item()
        for norm, order in (("max", float("inf")), ("Frobenius", 2.0)):
            error = _distance(results[name], expected, order)
            bound = max(2 * _distance(plain[name], expected, order), floor)
            if not error <= bound:
                raise WrongResultError(
                    f"{provider}: {name} is off by {error:.3g} in {norm} norm; the bound is {bound:.3g}"
                )


def _distance(result: Tensor, expected: Tensor, order: float) -> float:
    difference = result.detach().to(torch.float64) - expected
    return torch.linalg.vector_norm(difference, ord=order).item()


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill what `torch.empty` and `torch.empty_like` return with NaN, so that unwritten elements show."""

    def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*arguments: object, **named: object) -> Tensor:
            tensor = make(*arguments, **named)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    with mock.patch.multiple(torch, empty=poisoning(torch.empty), empty_like=poisoning(torch.empty_like)):
        yield
