"""Federated methods: two pure functions over stacks of factors each, one file and one line in the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fed.errors import FedError
from fed.methods import fed_plora, fedex_lora, fedit, fedsa_lora, ffa_lora, flexlora, flora, hetlora, raflora, rolora
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def send_all(server: ServerState, begun: ClientStart, update: ClientUpdate) -> ClientUpdate:
    """Return the update as it is: everything trained is sent, nothing is kept."""
    return update


class Method(NamedTuple):
    """What tells one federated method from another.

    `start` says what a client begins a round with; `aggregate` makes the next server state of at least one
    update; `finish`, for the few that need it, is the client's last word before it sends: what it keeps to itself.
    None changes what it is given.

    `equal_ranks`: every client's rank must be R. `by_module`: aggregates module by module, so that `agg_noise_module`
    has a meaning. `moves_factors`: the server's factors go on from round to round, so that a server-side optimiser
    may take the step. `personal`: clients' models differ after aggregation. `folds`: it adds to the base's weights, or
    holds more than R modules a matrix, which the base has to take in. `selects`: clients train what
    `adapter.selection` picks.
    """

    title: str
    start: Callable[[ServerState, Client, ClientRandom], ClientStart]
    aggregate: Callable[[ServerState, Sequence[ClientUpdate]], ServerState]
    finish: Callable[[ServerState, ClientStart, ClientUpdate], ClientUpdate] = send_all
    equal_ranks: bool = False
    by_module: bool = False
    moves_factors: bool = False
    personal: bool = False
    folds: bool = False
    selects: bool = False


METHODS = {
    "fed-plora": Method(
        "Fed-PLoRA", fed_plora.start, fed_plora.aggregate, by_module=True, moves_factors=True, selects=True
    ),
    "fedit": Method("FedIT", fedit.start, fedit.aggregate, equal_ranks=True, by_module=True, moves_factors=True),
    "flora": Method("FLoRA", flora.start, flora.aggregate, folds=True),
    "flexlora": Method("FlexLoRA", flexlora.start, flexlora.aggregate, folds=True),
    "hetlora": Method("HETLoRA", hetlora.start, hetlora.aggregate, hetlora.finish, moves_factors=True),
    "ffa-lora": Method(
        "FFA-LoRA", ffa_lora.start, ffa_lora.aggregate, equal_ranks=True, by_module=True, moves_factors=True
    ),
    "fedex-lora": Method("FedEx-LoRA", fedex_lora.start, fedex_lora.aggregate, equal_ranks=True, folds=True),
    "fedsa-lora": Method(
        "FedSA-LoRA",
        fedsa_lora.start,
        fedsa_lora.aggregate,
        fedsa_lora.finish,
        equal_ranks=True,
        by_module=True,
        moves_factors=True,
        personal=True,
    ),
    "rolora": Method("RoLoRA", rolora.start, rolora.aggregate, equal_ranks=True, by_module=True, moves_factors=True),
    "raflora": Method("raFLoRA", raflora.start, raflora.aggregate, folds=True),
}


def find(name: str) -> Method:
    """Return the method of that name; raises `FedError`, naming those there are, where there is none.

    >>> find("fed-plora").title
    'Fed-PLoRA'
    """
    if name not in METHODS:
        raise FedError(f"method is {name!r}; one of {', '.join(METHODS)} would be right")
    return METHODS[name]
