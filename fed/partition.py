"""How rows are dealt out: a held-out part with every label's share in it, and the clients' parts."""

from __future__ import annotations

import heapq
from typing import Any, Literal

import numpy as np

from fed.errors import FedError

Array = np.ndarray[Any, np.dtype[np.int64]]

_FEWEST_ROWS = 2


def split_stratified(labels: Array, fraction: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return (taken, left), sorted row indices; of every label round(fraction · rows) rows are taken."""
    taken = [
        rng.permutation(rows := np.flatnonzero(labels == label))[: round(fraction * len(rows))]
        for label in np.unique(labels)
    ]
    chosen = np.sort(np.concatenate(taken))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def partition_dirichlet(
    labels: Array, clients: int, alpha: float | Literal["iid"], rng: np.random.Generator
) -> list[Array]:
    """Deal rows out to clients with label skew and return each client's sorted row indices.

    For every label, shares ~ Dirichlet(alpha · 1) cut its shuffled rows into one piece a client; "iid" deals
    all rows out evenly. A client left with fewer than 2 rows then takes some from the largest, one at a time.
    Raises FedError where there are fewer than 2 rows a client.
    """
    if len(labels) < _FEWEST_ROWS * clients:
        raise FedError(
            f"clients.count is {clients}: {len(labels)} training rows allow at most "
            f"{len(labels) // _FEWEST_ROWS} clients of {_FEWEST_ROWS} rows"
        )
    if alpha == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(piece.tolist())
    # The largest first, of equal ones the first; while any has too few, the largest has more than enough.
    largest = [(-len(part), index) for index, part in enumerate(parts)]
    heapq.heapify(largest)
    for part in parts:
        while len(part) < _FEWEST_ROWS:
            size, index = largest[0]
            part.append(parts[index].pop())
            heapq.heapreplace(largest, (size + 1, index))
    return [np.sort(np.array(part)) for part in parts]
