"""Splitting rows: a stratified held-out part, and a partition of the rest among the clients.

IID and Dirichlet partitions and rows shared by clients are implemented here. All other partitioners are those of
`flwr_datasets`, which is imported only if one of them is used.
"""

from __future__ import annotations

import contextlib
import heapq
import inspect
import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fed.config import RunConfig
from fed.data.rows import some_of
from fed.errors import FedError
from fed.seeding import permutation, seed_of

_NAMED = {"natural": "NaturalIdPartitioner", "pathological": "PathologicalPartitioner"}
_ROW, _GROUP = "row", "group"

Array = np.ndarray[Any, np.dtype[np.int64]]

_FEWEST_ROWS = 2


def deal(config: RunConfig, groups: Array) -> list[Array]:
    """Partition n rows, whose labels or groups are `groups` (n,), and return each client's sorted row indices.

    `data.partition` is the kind of partition. "iid" and "dirichlet" are implemented here, give the same parts on every
    machine and leave no client empty; all others use `flwr_datasets`. With `data.rows_per_client` each client draws its
    rows instead (`draw_rows`): several clients may then have the same row, and a client's rows do not depend on the
    number of clients. Raises FedError if a client would have no rows.
    """
    data, clients = config.data, config.clients
    alpha = "iid" if data.partition == "iid" else clients.dirichlet_alpha
    if data.rows_per_client:
        if len(groups) < data.rows_per_client:
            raise FedError(
                f"data.rows_per_client is {data.rows_per_client}: there are {len(groups)} training rows to draw from; "
                "it should be at most that"
            )
        by_label = [np.flatnonzero(groups == label) for label in np.unique(groups)]
        seeds = (seed_of(config.seed, "partition", client) for client in range(clients.count))
        return [draw_rows(by_label, data.rows_per_client, alpha, np.random.default_rng(seed)) for seed in seeds]
    if data.partition in ("iid", "dirichlet"):
        return partition_dirichlet(
            groups, clients.count, alpha, np.random.default_rng(seed_of(config.seed, "partition"))
        )

    # The partitioners of flwr_datasets keep the order of rows, so without shuffling the first rows of a label would
    # all go to the first client.
    order = permutation(len(groups), config.seed, "partition", "order")
    parts = [np.sort(order[part]) for part in partition(config, groups[order])]
    if data.partition == "natural":
        parts = _merged(config, parts)
    if len(parts) != clients.count:
        raise FedError(f"clients.count is {clients.count}: {data.partition} makes {len(parts)} parts; make them equal")
    if empty := [client for client, part in enumerate(parts) if len(part) == 0]:
        raise FedError(
            f"data.partition is {data.partition!r}: client {empty[0]} gets no row of {len(groups)}; "
            f"fewer than clients.count ({clients.count}) clients, or more rows, would be right"
        )
    return parts


@dataclass(frozen=True)
class Classes:
    """The values of a column that clients should train on: of each of n rows its number in `names`, or -1 for none."""

    column: str
    numbers: Array
    names: Sequence[str]


def describe_leftover(config: RunConfig, pool: Array, parts: Sequence[Array], classes: Sequence[Classes]) -> str | None:
    """Return a line on training rows that no client has or several have, and on classes no client has; None if none.

    `pool` are the training rows and `parts` each client's rows, as indices of all n rows. Sharing rows is what
    `data.rows_per_client` is for, so with it rows of several clients are not mentioned.
    """
    data, found = config.data, []
    dealt, counts = np.unique(np.concatenate(parts), return_counts=True)
    if rest := len(pool) - len(dealt):
        found.append(f"{rest} of {len(pool)} training rows go to no client")
    if (shared := np.count_nonzero(counts > 1)) and not data.rows_per_client:
        found.append(f"{shared} of {len(pool)} training rows go to several clients")
    for kind in classes:
        missing = np.setdiff1d(kind.numbers[kind.numbers >= 0], kind.numbers[dealt])
        if len(missing):
            named = some_of((repr(kind.names[number]) for number in missing), most=30)
            found.append(f"no client trains on {kind.column} {named}")
    way = f"data.rows_per_client is {data.rows_per_client}" if data.rows_per_client else f"partition {data.partition!r}"
    return f"{way}: {'; '.join(found)}" if found else None


def _merged(config: RunConfig, parts: list[Array]) -> list[Array]:
    """Return one part for each client; if there are more parts than clients, deal them out shuffled and merge them."""
    count = config.clients.count
    if len(parts) < count:
        raise FedError(
            f"clients.count is {count}: {config.data.partition_by or config.data.label!r} has {len(parts)} values, "
            "and a natural client has one or more of its own; values of held-out rows alone do not count"
        )
    if len(parts) == count:
        return parts
    order = permutation(len(parts), config.seed, "partition", "values")
    return [np.sort(np.concatenate([parts[part] for part in order[client::count]])) for client in range(count)]


def split_stratified(labels: Array, fraction: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the sorted indices of rows (taken, left), where round(fraction · rows) rows of each label are taken."""
    taken = [
        rng.permutation(rows := np.flatnonzero(labels == label))[: round(fraction * len(rows))]
        for label in np.unique(labels)
    ]
    chosen = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *taken]))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def partition_dirichlet(
    labels: Array, clients: int, alpha: float | Literal["iid"], rng: np.random.Generator
) -> list[Array]:
    """Partition rows among clients with Dirichlet label skew and return each client's sorted row indices.

    The shuffled rows of each label are cut into one piece for each client, by shares ~ Dirichlet(alpha · 1); "iid"
    divides all rows evenly instead. A client with fewer than 2 rows then takes rows from the client with most, one at a
    time. Raises FedError if there are fewer than 2 rows per client.
    """
    if len(labels) < _FEWEST_ROWS * clients:
        raise FedError(
            f"clients.count is {clients}: {len(labels)} training rows allow at most "
            f"{len(labels) // _FEWEST_ROWS} clients of {_FEWEST_ROWS} rows; with data.rows_per_client they share rows"
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
    # A heap with the client with most rows first. As there are at least 2 rows per client, that client has more than 2
    # while any client has fewer.
    largest = [(-len(part), index) for index, part in enumerate(parts)]
    heapq.heapify(largest)
    for part in parts:
        while len(part) < _FEWEST_ROWS:
            size, index = largest[0]
            part.append(parts[index].pop())
            heapq.heapreplace(largest, (size + 1, index))
    return [np.sort(np.array(part)) for part in parts]


def draw_rows(by_label: Sequence[Array], rows: int, alpha: float | Literal["iid"], rng: np.random.Generator) -> Array:
    """Draw one client's rows without replacement and return their sorted indices, (rows,).

    `by_label` holds the indices of all rows of each label. The client's label shares are ~ Dirichlet(alpha · 1), or
    those of all rows if "iid", and its number of rows of each label is multinomial. If a label has too few rows, the
    missing ones are drawn from the other labels by their shares.
    """
    available = np.array([len(part) for part in by_label])
    shares = available / available.sum() if alpha == "iid" else rng.dirichlet(np.full(len(by_label), alpha))
    counts = np.zeros_like(available)
    while missing := rows - counts.sum():
        left = available - counts
        weights = np.where(left > 0, shares, 0.0)
        if weights.sum() == 0:  # with a small alpha the shares of all labels but one may be rounded to 0
            weights = left.astype(np.float64)
        counts += np.minimum(rng.multinomial(missing, weights / weights.sum()), left)
    drawn = [rng.choice(part, count, replace=False) for part, count in zip(by_label, counts, strict=True) if count]
    return np.sort(np.concatenate(drawn))


def partition(config: RunConfig, groups: Array) -> list[Array]:
    """Partition rows with these `groups` (n,) by a partitioner of `flwr_datasets`; return the row indices of each part.

    Raises FedError if the library is missing, or the partitioner is unknown or fails.
    """
    try:
        import datasets
        import flwr_datasets.partitioner as partitioners
    except ImportError:
        raise FedError(
            f"data.partition is {config.data.partition!r}: it needs the library flwr-datasets: "
            "install plora-kernels[data]"
        ) from None

    class Numbered(datasets.Dataset):
        """A data set whose `select` returns row numbers: building data sets for 10,000 clients would take a minute."""

        def select(self, indices: Iterable[int], *_: object, **__: object) -> Array:
            return np.fromiter(indices, dtype=np.int64)

        def sort(self, *names: Any, **settings: Any) -> Any:
            # Sorting changes the row numbers, so this returns a plain data set, which keeps them in a column.
            return datasets.Dataset.from_dict(self[:]).sort(*names, **settings)

    name = _NAMED.get(config.data.partition, config.data.partition)
    kind = getattr(partitioners, name, None)
    if kind is None or name.startswith("Vertical"):  # those give every client all rows, and some of the columns
        known = ", ".join(other for other in partitioners.__all__ if not other.startswith("Vertical"))
        raise FedError(f"data.partition is {name!r}: flwr_datasets has {known}")
    try:
        # The library shows a progress bar and warnings that are harmless or lead to a FedError in `deal`.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            maker = kind(**_settings(config, kind))
            maker.dataset = Numbered.from_dict({_ROW: np.arange(len(groups)), _GROUP: groups})
            return [_numbers(maker.load_partition(part)) for part in range(maker.num_partitions)]
    except Exception as error:  # what the library raises for arguments that it does not expect may be anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FedError(f"data.partition is {config.data.partition!r}: {reason}") from error


def _numbers(part: Any) -> Array:
    """Return the row numbers of a part, which is an array of them or a data set with a column of them."""
    return part if isinstance(part, np.ndarray) else np.array(part[:][_ROW], dtype=np.int64)


def _settings(config: RunConfig, kind: Any) -> dict[str, Any]:
    """Return the arguments of a partitioner: those of the run that its constructor takes, and `partition_options`."""
    data = config.data
    ours = {
        "num_partitions": config.clients.count,
        "partition_by": _GROUP,
        "seed": seed_of(config.seed, "partition") % 2**32,
        "num_classes_per_partition": data.labels_per_client,
        "class_assignment_mode": "first-deterministic",  # as in the paper that introduced it; uses every label
    }
    asked = inspect.signature(kind).parameters
    return {name: value for name, value in ours.items() if name in asked} | data.partition_options
