"""Aggregation rules that a minority of broken or hostile clients cannot move far, module by module.

A rule makes one vector of several. For module j the vectors are the clients' (a_j, b_j), one after the other, over Q_j,
the clients that trained it, so that a rule sees as many clients as a mean would; for the head they are all its numbers,
over all clients of the round. A module that nobody trained keeps its value.

b_j a_jᵀ is the same for (c a_j, b_j / c), so coordinates of two pairs can be compared only where both come from one
pair. They do: all clients of a round start module j from the server's a_j and b_j. Distances are taken between the
factors and not between the products, for a pair with a large c would pass by its product and spoil the next round.

What |Q_j| = n clients can withstand: the median a minority of them; the trimmed mean as many as are cut from one end;
Krum f. With one client every rule returns what that client sent, and with two the median is their mean: nothing but
`server.max_update_norm` bounds these.

Everything is computed in fp64 in the order of clients and rounded once.

Sources: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
arXiv 1803.01498 (median, trimmed mean); Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant
Gradient Descent", NeurIPS 2017 (Krum).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fed.types import ClientUpdate, Factors, Options, ServerState

MEAN = "mean"
_SLACK = 1e-9  # relative; shares such as 0.07 · 100 come out a little above the whole number that they are


def combine(values: Tensor, weights: Tensor, options: Options) -> Tensor:
    """Return the vector (d,) that the rule `options.aggregation` makes of `values` (n, d) with weights (n,), all fp64.

    "median" and "trimmed-mean" weigh clients by `weights`; "krum" takes no weights, which must be equal.
    """
    if options.aggregation == "median":
        return median(values, weights)
    if options.aggregation == "trimmed-mean":
        return trimmed_mean(values, weights, options.trim)
    if options.aggregation == "krum":
        return krum(values, options.byzantine_share)
    raise ValueError(f"{options.aggregation!r} is no rule; 'median', 'trimmed-mean' or 'krum' would be right")


def median(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted median of every column of `values` (n, d), with weights (n,): (d,) fp64.

    It is the least value at which the weights of all values up to it reach half of their sum; where they are exactly
    half, the mean of that value and the next, so that with equal weights it is the ordinary median.

    >>> median(torch.tensor([[1.0], [9.0], [2.0], [4.0]]), torch.ones(4))
    tensor([3.], dtype=torch.float64)
    """
    ordered, reached, total = _ordered(values, weights)
    half, slack = total / 2, _SLACK * total
    lower = (reached < half - slack).sum(0)  # (d,): how many values lie below the median
    upper = (reached <= half + slack).sum(0).clamp(max=len(values) - 1)
    return (ordered.gather(0, lower[None]) + ordered.gather(0, upper[None]))[0] / 2


def trimmed_mean(values: Tensor, weights: Tensor, trim: float) -> Tensor:
    """Return the weighted mean of every column of `values` (n, d) without the least and the greatest: (d,) fp64.

    From each end so many values are cut that their weights reach the share `trim` of the sum, with equal weights
    ⌈trim · n⌉ of them, always at least one. Where nothing is left, with n ≤ 2 ⌈trim · n⌉, it is the median.

    >>> trimmed_mean(torch.tensor([[1.0], [2.0], [4.0], [900.0]]), torch.ones(4), 0.2)
    tensor([3.], dtype=torch.float64)
    """
    ordered, reached, total = _ordered(values, weights)
    own = reached.diff(dim=0, prepend=torch.zeros_like(reached[:1]))  # (n, d): each value's weight
    cut = (trim - _SLACK) * total
    before, behind = reached - own, total - reached
    kept = torch.where((before >= cut) & (behind >= cut), own, 0.0)
    left = kept.sum(0)
    mean = (kept * ordered).sum(0) / torch.where(left > 0, left, 1.0)
    return mean if bool((left > 0).all()) else torch.where(left > 0, mean, median(values, weights))


def krum(values: Tensor, byzantine_share: float) -> Tensor:
    """Return the row of `values` (n, d) with the least Σ ‖x_i − x_k‖² over its n − f − 2 nearest others: (d,) fp64.

    f = ⌈byzantine_share · n⌉ is how many of the n clients may be hostile. Of equal sums the first client's row is
    taken. Krum needs n ≥ 2 f + 3; fewer fall back to the median.

    >>> krum(torch.tensor([[1.0], [2.0], [2.5], [3.5], [99.0]]), 0.2)
    tensor([2.], dtype=torch.float64)
    """
    n, hostile = len(values), most_hostile(len(values), byzantine_share)
    if n < 2 * hostile + 3:
        return median(values, torch.ones(n, dtype=torch.float64, device=values.device))
    values = values.double()
    distances = torch.stack([(values - row).square().sum(1) for row in values])  # (n, n); products would cancel
    nearest = distances.sort(1).values[:, 1 : n - hostile - 1]  # without itself, at distance 0
    return values[int(nearest.sum(1).argmin())]


def most_hostile(count: int, byzantine_share: float) -> int:
    """Return f, how many of `count` clients are assumed to be hostile at most: ⌈byzantine_share · count⌉.

    >>> most_hostile(10, 0.2), most_hostile(5, 0.3)
    (2, 2)
    """
    return math.ceil((byzantine_share - _SLACK) * count)


def robust_modules(server: ServerState, updates: Sequence[ClientUpdate], sides: str = "AB") -> dict[str, Factors]:
    """Return, for every matrix, A (R, K) and B (N, R) combined module by module by the server's rule.

    `sides` names the factors that were trained; the other factor enters no distance and is the server's, bit for bit.
    """
    combined = {}
    for matrix, (A, B) in server.adapter.factors.items():
        A, B = A.clone(), B.clone()
        trained: dict[int, list[tuple[Tensor, float]]] = {}  # for each module, the vectors and weights of Q_j
        for update in updates:
            own_A, own_B = update.factors[matrix]
            for place, module in enumerate(update.selected[matrix]):
                row = torch.cat([own_A[place] if side == "A" else own_B[:, place] for side in sides])
                trained.setdefault(module, []).append((row, update.weight))
        for module, sent in trained.items():
            found = _combined([row for row, _ in sent], [weight for _, weight in sent], server.options)
            if "A" in sides:
                A[module] = found[: A.shape[1]].to(A.dtype)
            if "B" in sides:
                B[:, module] = found[-B.shape[0] :].to(B.dtype)
        combined[matrix] = (A, B)
    return combined


def robust_head(server: ServerState, updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Return every head parameter combined by the server's rule; Krum takes the whole head of one client."""
    if not server.head:
        return {}
    rows = [torch.cat([update.head[name].reshape(-1).double() for name in server.head]) for update in updates]
    found = _combined(rows, [update.weight for update in updates], server.options)
    parts = found.split([own.numel() for own in server.head.values()])
    return {name: part.view_as(own).to(own.dtype) for (name, own), part in zip(server.head.items(), parts, strict=True)}


def _combined(rows: Sequence[Tensor], weights: Sequence[float], options: Options) -> Tensor:
    values = torch.stack([row.double() for row in rows])
    return combine(values, torch.tensor(weights, dtype=torch.float64, device=values.device), options)


def _ordered(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return every column's values in order (n, d), the sums of weights up to each (n, d), and of all, a scalar.

    Equal values stand by their weights, so that the order of clients does not matter.
    """
    lightest = weights.argsort(stable=True)
    values, weights = values[lightest], weights[lightest]
    ordered, order = values.double().sort(dim=0, stable=True)
    reached = weights.double()[order].cumsum(0)
    return ordered, reached, weights.double().sum()
