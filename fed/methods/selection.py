"""Which modules a client trains: strategies of one signature, by name.

A strategy gets one matrix's `Candidates`, the client's budget r_i and its randomness, and returns r_i of the modules
0 … R-1, ascending. It is a function of these alone: neither the order of calls nor other clients matter.
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
    """The modules of one matrix: the server's A (R, K) and B (N, R), and what is known of each.

    `visits` (R,) int64 counts how often a module was trained so far; `gradients` (R,) fp64 are the norms of the
    client's own gradient at the start of the round, None where the strategy does not ask for them.
    """

    matrix: str
    factors: Factors
    visits: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def rank(self) -> int:
        """Return R."""
        return self.factors[0].shape[0]


Strategy = Callable[[Candidates, int, ClientRandom], tuple[int, ...]]


def random_selection(seed: int, round_number: int, client: int, matrix: str, rank: int, budget: int) -> tuple[int, ...]:
    """Return `budget` of the modules 0 … rank-1, ascending, every subset equally likely.

    The draw is a function of (seed, round, client, matrix) alone: the order of calls does not matter, and
    each client has its own draw for each matrix in each round. Raises `FedError` where budget is outside 0 …
    rank.
    """
    check_budget(client, rank, budget)
    order = ClientRandom(seed, round_number, client).permutation(rank, "select", matrix)
    return tuple(sorted(order[:budget].tolist()))


def check_budget(client: int, rank: int, budget: int) -> None:
    """Raise `FedError` unless 0 ≤ budget ≤ rank."""
    if not 0 <= budget <= rank:
        raise FedError(f"client {client} cannot train {budget} modules of {rank}; 0 to {rank} would be right")


def uniform_random(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Draw every subset with equal chance, anew for every client, matrix and round."""
    return random_selection(rng.seed, rng.round, rng.client, modules.matrix, modules.rank, budget)


def shared_random(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Draw one order a round and matrix, the same for all clients: each takes the first r_i of it."""
    order = permutation(modules.rank, rng.seed, rng.round, "select", modules.matrix)
    return tuple(sorted(order[:budget].tolist()))


def first(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take modules 0 … r_i-1, always."""
    return tuple(range(budget))


def round_robin(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take r_i modules in a row, going on where the last round's ended and shifted by r_i from client to client."""
    begin = (rng.round - 1 + rng.client) * budget
    return tuple(sorted((begin + step) % modules.rank for step in range(budget)))


def largest_norm(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take the modules of largest ‖b_j‖‖a_j‖."""
    A, B = modules.factors
    return _largest(A.double().norm(dim=1) * B.double().norm(dim=0), modules, budget, rng)


def least_visited(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take the modules that were trained least often so far, by all clients together."""
    visits = torch.zeros(modules.rank) if modules.visits is None else modules.visits
    return _largest(-visits.double(), modules, budget, rng)


def largest_gradient(modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Take the modules with the largest gradient (‖∂L/∂a_j‖² + ‖∂L/∂b_j‖²)^½ on the client's first batch."""
    if modules.gradients is None:
        raise FedError(f"client {rng.client} has no gradients for {modules.matrix}; selection by gradient needs them")
    return _largest(modules.gradients, modules, budget, rng)


def _largest(scores: Tensor, modules: Candidates, budget: int, rng: ClientRandom) -> tuple[int, ...]:
    """Return the `budget` modules of largest score (R,); a keyed draw decides between equal ones."""
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
    """Return the strategy of that name; raises `FedError`, naming those there are, where there is none."""
    if name not in STRATEGIES:
        raise FedError(f"adapter.selection is {name!r}; one of {', '.join(STRATEGIES)} would be right")
    return STRATEGIES[name]
