"""Partitions by the library `flwr_datasets`. Only needed where one of its partitioners is asked for."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fed.errors import FedError
from fed.partition import Array
from fed.streams import seed_of

if TYPE_CHECKING:
    from fed.config import RunConfig

_NAMED = {"natural": "NaturalIdPartitioner", "pathological": "PathologicalPartitioner"}
_ROW, _GROUP = "row", "group"


def partition(config: RunConfig, groups: Array) -> list[Array]:
    """Return row indices, a part for each partition `data.partition` makes of rows with these `groups` (n,)."""
    try:
        import datasets
        import flwr_datasets.partitioner as partitioners
    except ImportError:
        raise FedError(
            f"data.partition is {config.data.partition!r}: it needs the library flwr-datasets: "
            "install plora-kernels[data]"
        ) from None

    class Numbered(datasets.Dataset):
        """Rows whose parts are the numbers of their rows: true parts take a minute for ten thousand clients."""

        def select(self, indices: Iterable[int], *_: object, **__: object) -> Array:
            return np.fromiter(indices, dtype=np.int64)

        def sort(self, *names: Any, **settings: Any) -> Any:
            return datasets.Dataset.from_dict(self[:]).sort(*names, **settings)  # rows have other numbers now

    name = _NAMED.get(config.data.partition, config.data.partition)
    kind = getattr(partitioners, name, None)
    if kind is None:
        known = ", ".join(partitioners.__all__)
        raise FedError(f"data.partition is {name!r}: flwr_datasets has {known}")
    failure = f"data.partition is {config.data.partition!r}"
    try:
        # It warns of what is refused below or does no harm, and draws a progress bar.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            maker = kind(**_settings(config, kind))
            maker.dataset = Numbered.from_dict({_ROW: np.arange(len(groups)), _GROUP: groups})
            return [_numbers(maker.load_partition(part)) for part in range(maker.num_partitions)]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FedError(f"{failure}: {reason}") from error


def _numbers(part: Any) -> Array:
    """The row numbers of a part, or of the rows it holds."""
    return part if isinstance(part, np.ndarray) else np.array(part[:][_ROW], dtype=np.int64)


def _settings(config: RunConfig, kind: Any) -> dict[str, Any]:
    """What the run's configuration has to say to a partitioner, as far as it asks for it."""
    data = config.data
    ours = {
        "num_partitions": config.clients.count,
        "partition_by": _GROUP,
        "seed": seed_of(config.seed, "partition") % 2**32,
        "num_classes_per_partition": data.labels_per_client,
        "class_assignment_mode": "first-deterministic",  # as in the paper it is taken from; uses every label
    }
    asked = inspect.signature(kind).parameters
    return {name: value for name, value in ours.items() if name in asked} | data.partition_options
