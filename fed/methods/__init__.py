"""Federated methods. Each is a file with pure functions for a client's start and for aggregation, listed in METHODS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fed.errors import FedError
from fed.methods import fed_plora, fedex_lora, fedit, fedsa_lora, ffa_lora, flexlora, flora, hetlora, raflora, rolora
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def send_all(server: ServerState, begun: ClientStart, update: ClientUpdate) -> ClientUpdate:
    """Return the update unchanged: the client sends everything that it trained and keeps nothing."""
    return update


class Method(NamedTuple):
    """The functions of a federated method and its properties.

    `start` returns what a client starts a round with, and `aggregate` the next server state from one or more updates.
    `finish` is applied to a client's update after training, and sets what the client sends and what it keeps. None of
    them changes its arguments.

    `equal_ranks`: every client's rank must be R. `by_module`: updates are averaged module by module, so that
    `agg_noise_module` has a meaning, and by `fed.methods.average.next_state`, which goes by `server.aggregation`.
    `moves_factors`: the server's factors change gradually from round to round, so that the server's optimiser can be
    applied to them. `personal`: clients' models differ after aggregation. `folds`: the method adds to the base's
    weights, or holds more than R modules in a matrix, of which the rest is folded into the base. `selects`: clients
    train the modules that `adapter.selection` chooses.
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
    "raflora": Method("raFLoRA", flexlora.start, raflora.aggregate, folds=True),
}


def find(name: str) -> Method:
    """Return the method of that name; raise `FedError`, listing all names, if there is none.

    >>> find("fed-plora").title
    'Fed-PLoRA'
    """
    if name not in METHODS:
        raise FedError(f"method is {name!r}; one of {', '.join(METHODS)} would be right")
    return METHODS[name]
