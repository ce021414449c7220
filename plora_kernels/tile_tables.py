"""Where tables of the rows of tiles stay: with offsets of groups that never change, for every layer and pass."""

from __future__ import annotations

from typing import cast

from torch import Tensor

# Rows, rows of a tile, and the stream on which the table was made.
Key = tuple[int, int, int]


def keep_tables(offsets: Tensor) -> Tensor:
    """Return offsets (C+1,) that nobody writes to any more: tables made from them stay with them and go with them."""
    # An attribute lives as long as the tensor, and autograd and torch's dispatcher hand on the tensor itself.
    offsets._plora_tables = {}  # type: ignore[attr-defined]
    return offsets


def tables_of(offsets: Tensor) -> dict[Key, Tensor] | None:
    """Return the tables kept with offsets, None for those that may change."""
    return cast("dict[Key, Tensor] | None", getattr(offsets, "_plora_tables", None))
