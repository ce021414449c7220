"""Federated methods: two pure functions over stacks of factors each, one file and one line in the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fed.errors import FedError
from fed.methods import fed_plora, fedit
from fed.streams import Source
from fed.types import Client, ClientStart, ClientUpdate, ServerState


class Method(NamedTuple):
    """What tells one federated method from another.

    `start` says what a client begins a round with; `aggregate` makes the next server state of at least one
    update. Neither changes what it is given.
    """

    start: Callable[[ServerState, Client, Source], ClientStart]
    aggregate: Callable[[ServerState, Sequence[ClientUpdate]], ServerState]


METHODS = {
    "fed-plora": Method(fed_plora.start, fed_plora.aggregate),
    "fedit": Method(fedit.start, fedit.aggregate),
}


def find(name: str) -> Method:
    """Return the method of that name; raises `FedError`, naming those there are, where there is none."""
    if name not in METHODS:
        raise FedError(f"method is {name!r}; one of {', '.join(METHODS)} would be right")
    return METHODS[name]
