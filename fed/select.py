"""Which modules a client trains."""

from __future__ import annotations

from fed.errors import FedError
from fed.streams import Source


def random_selection(seed: int, round_number: int, client: int, matrix: str, rank: int, budget: int) -> tuple[int, ...]:
    """Return `budget` of the modules 0 … rank-1, ascending, every subset equally likely.

    The draw is a function of (seed, round, client, matrix) alone: the order of calls does not matter, and
    each client has its own draw for each matrix in each round. Raises `FedError` where budget is outside 0 …
    rank.
    """
    if not 0 <= budget <= rank:
        raise FedError(f"client {client} cannot train {budget} modules of {rank}; 0 to {rank} would be right")
    order = Source(seed, round_number, client).permutation(rank, "select", matrix)
    return tuple(sorted(order[:budget].tolist()))
