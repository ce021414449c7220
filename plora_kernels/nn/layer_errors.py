"""Errors of one layer, said of a model: the layer's name comes first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from plora_kernels.errors import DTypeError, StateError


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Within the context, put the layer's name before the message of a StateError or DTypeError."""
    try:
        yield
    except (StateError, DTypeError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None
