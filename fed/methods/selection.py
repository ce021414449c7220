"""Strategies for selecting the modules that a client trains, by name.

A strategy takes the `Candidates` of one matrix, the client's budget r_i and its random streams, and returns r_i of the
modules 0 … R-1, ascending. The result depends on these arguments only, not on the order of calls or other clients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fed.errors import FedError
from fed.seeding import ClientRandom, permutation
from fed.types import Factors


@dataclass(frozen=True)
class Candidates:
    """The modules of one matrix, the server's A (R, K) and B (N, R), with figures to select by.

    `visits` (R,) int64 counts how often each module was trained so far, and is None before the first time. `gradients`
    (R,) fp64 are the norms of each module's gradient on the client's data at the start of the round; they are None
    unless modules are selected by gradients.
    """

    matrix: str
    factors: Factors
    visits: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def rank(self) -> int:
        """R, the number of modules."""
        return self.factors[0].shape[0]


Strategy = Callable[[Candidates, int, ClientRandom], tuple[int, ...]]


def check_budget(client: int, rank: int, budget: int) -> None:
    """Raise `FedError` unless 0 ≤ budget ≤ rank."""
    if not 0 <= budget <= rank:
        raise FedError(f"client {client} cannot train {budget} modules of {rank}; 0 to {rank} would be right")


def uniform_random(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Draw a subset, all with equal probability, for each client, matrix and round."""
    return tuple(sorted(rng.permutation(modules.rank, "select", modules.matrix)[:budget].tolist()))


def shared_random(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take the first r_i modules of a random order, which is the same for all clients in a round and matrix."""
    order = permutation(modules.rank, rng.seed, rng.round, "select", modules.matrix)
    return tuple(sorted(order[:budget].tolist()))


def first(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take modules 0 … r_i-1 in every round."""
    return tuple(range(budget))


def round_robin(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take r_i consecutive modules, which move on by r_i, modulo R, from round to round and from client to client."""
    begin = (rng.round - 1 + rng.client) * budget
    return tuple(sorted((begin + step) % modules.rank for step in range(budget)))


def largest_norm(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take the modules with the largest ‖b_j‖‖a_j‖."""
    A, B = modules.factors
    return _largest(A.double().norm(dim=1) * B.double().norm(dim=0), modules, budget, rng)


def least_visited(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take the modules that all clients together have trained least often so far."""
    visits = torch.zeros(modules.rank) if modules.visits is None else modules.visits
    return _largest(-visits.double(), modules, budget, rng)


def largest_gradient(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take the modules with the largest gradient (‖∂L/∂a_j‖² + ‖∂L/∂b_j‖²)^½ on the client's first batch."""
    if modules.gradients is None:
        raise FedError(f"client {rng.client} has no gradients for {modules.matrix}; selection by gradient needs them")
    return _largest(modules.gradients, modules, budget, rng)


def _largest(scores: Tensor, modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Return the `budget` modules with the largest scores (R,); among equal ones the client's random order decides."""
    order = rng.permutation(modules.rank, "select", modules.matrix)
    values = scores.tolist()
    ranked = sorted(order.tolist(), key=lambda module: -values[module])
    return tuple(sorted(ranked[:budget]))


STRATEGIES: dict[str, Strategy] = {
    "random": uniform_random,
    "shared-random": shared_random,
    "first": first,
    "round-robin": round_robin,
    "largest-norm": largest_norm,
    "least-visited": least_visited,
    "gradient": largest_gradient,
}


def find(name: str) -> Strategy:
    """Return the strategy of that name; raise `FedError`, listing all names, if there is none."""
    if name not in STRATEGIES:
        raise FedError(f"adapter.selection is {name!r}; one of {', '.join(STRATEGIES)} would be right")
    return STRATEGIES[name]
