"""A cache of the grouped kernels' tile tables (the rows of each tile), kept as an attribute of the offsets tensor.

Group offsets that never change serve every layer and pass, so their tables are made once.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

# Number of rows M, BLOCK_M, and the CUDA stream on which the table was made.
Key = tuple[int, int, int]


def keep_tables(offsets: Tensor) -> Tensor:
    """Return offsets (C+1,), marked as constant: tables made from them are cached as long as the tensor lives."""
    # An attribute works because autograd and torch's dispatcher pass on the same Python object.
    offsets._plora_tables = {}  # type: ignore[attr-defined]
    return offsets


def tables_of(offsets: Tensor) -> dict[Key, Tensor] | None:
    """Return the tables cached with offsets, or None for offsets that may change."""
    return cast("dict[Key, Tensor] | None", getattr(offsets, "_plora_tables", None))
