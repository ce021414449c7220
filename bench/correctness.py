"""Whether a provider's results may be timed at all: held against the same mathematics in fp64."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Problem

Results = Mapping[str, Tensor]


class WrongResultError(Exception):
    """A provider's result that is too far from the fp64 reference; nothing of its case is timed."""


def plain_results(case: Case, problem: Problem, dtype: torch.dtype, *, adapted: bool) -> Results:
    """Return a case's results by plain torch at `dtype`; `adapted=False` leaves the adapter out.

    forward: y (m, n) = x Wᵀ + scale·(x Aᵀ) Bᵀ; forward_backward: y and the gradients of ⟨y, grad_y⟩, that is
    dx (m, k) and, where adapted, dA (r, k) and dB (n, r); fold: weight (n, k) = W + scale·B A.
    """
    weight, A, B = (tensor.to(dtype) for tensor in (problem.weight, problem.A, problem.B))
    if case.op == "fold":
        return {"weight": weight + problem.scale * (B @ A) if adapted else weight}
    leaves = {"dx": problem.x.to(dtype, copy=True)}
    if adapted:
        leaves |= {"dA": A.clone(), "dB": B.clone()}
    if case.op == "forward_backward":
        for leaf in leaves.values():
            leaf.requires_grad_()
    y = F.linear(leaves["dx"], weight)
    if adapted:
        y = y + problem.scale * F.linear(F.linear(leaves["dx"], leaves["dA"]), leaves["dB"])
    if case.op == "forward":
        return {"y": y}
    gradients = torch.autograd.grad(y, list(leaves.values()), problem.grad_y.to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(provider: str, results: Results, exact: Results, plain: Results, eps: float | None = None) -> None:
    """Refuse results further from fp64 than plain torch at the same dtype is, twice over.

    For every tensor, in max and in Frobenius norm,
    ‖result − exact‖ ≤ max(2·‖plain − exact‖, 4·eps·max|exact|), eps of the dtype unless one is given (tf32's has none).
    Raises WrongResultError naming the provider, the tensor, its error and the bound.
    """
    if results.keys() != exact.keys():
        raise WrongResultError(f"{provider} gives {sorted(results)}; the case needs {sorted(exact)}")
    for name, expected in exact.items():
        if results[name].shape != expected.shape:
            got, wanted = tuple(results[name].shape), tuple(expected.shape)
            raise WrongResultError(f"{provider}: {name} is {got}; the case needs {wanted}")
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
