"""The bytes of every round, up and down, from the configuration alone: those that a run without faults counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed import methods
from fed.config import RunConfig
from fed.errors import FedError
from fed.models.shared_model import SharedModel
from fed.seeding import ClientRandom
from fed.simulation.clients import drawn
from fed.simulation.communication import download_bytes, stack_bytes, upload_bytes
from fed.simulation.rounds import first_state
from fed.types import Client, ClientUpdate, ServerState, Stack

# How many modules a matrix the server folds into the base in a round, given those sent and R; others fold none.
_FOLDED = {"flora": lambda sent, rank: sent, "fedex-lora": lambda sent, rank: sent + rank}


@dataclass(frozen=True)
class Traffic:
    """A round's bytes, of all its clients: up from them, and down to them."""

    upload_bytes: int
    download_bytes: int


class _Zeros(ClientRandom):
    """Random streams of which only the sizes count: FLoRA draws a client's factors from them."""

    def uniform(self, size: int, *purpose: int | str) -> NDArray[np.float64]:
        """Return `size` zeros, which take no time to draw."""
        return np.zeros(size)


@dataclass(frozen=True)
class Messages:
    """The bytes of what one client sends and receives, by its rank and by whether it took part in the last round.

    `folded` are the bytes of one module a matrix that the server folds into the base, as those who missed it get it.
    """

    config: RunConfig
    server: ServerState
    folded: int
    _known: dict[tuple[int, int, bool], Traffic] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, config: RunConfig, shared: SharedModel) -> Messages:
        """Return those of a run whose model has no values (`fed.models.weightless`)."""
        server = first_state(shared, config)
        # The modules that are chosen differ by strategy, but not in number, and some strategies look at values.
        server = replace(server, options=replace(server.options, selection="first"))
        one = {
            matrix: Stack(A[:1], B[:, :1], torch.ones(1, dtype=torch.float64))
            for matrix, (A, B) in server.adapter.factors.items()
        }
        return cls(config, server, stack_bytes(one))

    def of_client(self, rank: int, number: int, last_round: int) -> Traffic:
        """Return what a client of this rank sends and gets in round `number`, but for what was folded meanwhile."""
        # RoLoRA sends other factors in even rounds, and to clients that were in the last one.
        key = rank, number % 2, last_round == number - 1 > 0
        if key not in self._known:
            self._known[key] = self._of_client(rank, number, last_round)
        return self._known[key]

    def _of_client(self, rank: int, number: int, last_round: int) -> Traffic:
        config, server = self.config, replace(self.server, round=number - 1)
        method, client = methods.find(config.method), Client(0, rank, 1, last_round=last_round)
        start = method.start(server, client, _Zeros(config.seed, number, 0))
        factors = {
            matrix: (A[: len(start.selected[matrix])], B[:, : len(start.selected[matrix])])
            for matrix, (A, B) in start.factors.items()
        }
        update = ClientUpdate(client, factors, start.selected, server.head, 1.0, 1, 0.0, sent=start.trained)
        sent = replace(update, sent=start.sends) if start.sends else update
        travels = config.train.head == "train"
        head: Mapping[str, Tensor] = server.head if travels else {}
        return Traffic(upload_bytes(start, sent, travels), download_bytes(start, head))

    def fold_bytes(self, sent: int) -> int:
        """Return the bytes of what the server folds into the base after a round with `sent` modules a matrix sent."""
        method = self.config.method
        if method in _FOLDED:
            return self.folded * _FOLDED[method](sent, self.config.adapter.rank)
        if method in methods.METHODS:
            return 0
        raise FedError(f"method is {method!r}: what it folds into the base is not known, so its bytes are not either")


def round_traffic(messages: Messages, ranks: Sequence[int], rounds: int) -> list[Traffic]:
    """Return the bytes of rounds 1 … `rounds` of a run in which client i has rank `ranks[i mod length]`.

    The clients of every round are those that the run draws, so the bytes are those of its rows, unless an update is
    left out or HETLoRA prunes ranks. It takes C log C a round.
    """
    config = messages.config
    population = range(config.clients.count)
    last = dict.fromkeys(population, 0)
    folds = [0]  # of the rounds so far, added up
    found = []
    for number in range(1, rounds + 1):
        up = down = modules = 0
        for client in drawn(config, population, number):
            rank, before = ranks[client % len(ranks)], last[client]
            own, missed = messages.of_client(rank, number, before), folds[-1] - folds[max(before - 1, 0)]
            up, down = up + own.upload_bytes, down + own.download_bytes + missed
            modules += rank
            last[client] = number
        folds.append(folds[-1] + messages.fold_bytes(modules))
        found.append(Traffic(up, down))
    return found


def expected_traffic(messages: Messages, ranks: Sequence[int], clients: int, per_round: int, rounds: int) -> Traffic:
    """Return a round's mean bytes over `rounds` rounds, with `per_round` of `clients` clients drawn in each.

        up = c · mean_r(up_r)        down = c · (mean_r(down_r) + F · mean_t((1 − (1 − q)^(t−1)) / q))

    q = c / C, and F what the server folds into the base in a round. A client drawn in round t missed the folds since
    the round that it was in before: a number that is geometric in q, or all t − 1.
    """
    share = per_round / clients
    seen = [ranks[client % len(ranks)] for client in range(min(clients, len(ranks)))]

    def of_round(rank: int, number: int, side: str) -> float:
        """Return a client's bytes, by whether it was in the last round, as it is with probability q."""
        was, was_not = (messages.of_client(rank, number, last) for last in (number - 1, 0))
        return share * getattr(was, side) + (1 - share) * getattr(was_not, side)

    # RoLoRA sends other factors in even rounds.
    up, down = (
        fmean(known[rank] for rank in seen)
        for side in ("upload_bytes", "download_bytes")
        for known in [{rank: fmean(of_round(rank, number, side) for number in (3, 4)) for rank in set(seen)}]
    )
    folded = messages.fold_bytes(round(per_round * fmean(seen)))
    gone = accumulate(range(1, rounds), lambda power, _: power * (1 - share), initial=1.0)  # (1 − q)^(t−1)
    missed = folded * fmean((1 - power) / share for power in gone)
    return Traffic(round(per_round * up), round(per_round * (down + missed)))
