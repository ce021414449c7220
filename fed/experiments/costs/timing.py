"""The time of a round on M machines, from measured speeds: what is shared out, and what is not (Amdahl's law)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Speeds:
    """What was measured: the clients that a machine trains in a second, and the server's own seconds a round.

    `network_bytes_per_second` is that of the server's link, 0 if bytes take no time.
    """

    clients_per_second: float
    server_seconds: float = 0.0
    network_bytes_per_second: float = 0.0


@dataclass(frozen=True)
class RoundTime:
    """The seconds of a round: of training, of the bytes over the server's link, and of the server alone."""

    train_seconds: float
    network_seconds: float
    server_seconds: float

    @property
    def total_seconds(self) -> float:
        """The seconds in all: the three come one after another."""
        return self.train_seconds + self.network_seconds + self.server_seconds

    @property
    def serial_share(self) -> float:
        """The share of the round that more machines do not shorten, 0 … 1."""
        return (self.network_seconds + self.server_seconds) / self.total_seconds


def round_time(speeds: Speeds, per_round: int, machines: int, round_bytes: int = 0) -> RoundTime:
    """Return the time of a round of `per_round` clients on `machines` machines.

        T(M) = ⌈c / M⌉ / m + bytes / bandwidth + s

    A client is trained by one machine, so that no more than c machines have work; `round_bytes` are those up and down.

    >>> round_time(Speeds(clients_per_second=2.0, server_seconds=1.0), per_round=10, machines=4).total_seconds
    2.5
    """
    network = round_bytes / speeds.network_bytes_per_second if speeds.network_bytes_per_second else 0.0
    return RoundTime(math.ceil(per_round / machines) / speeds.clients_per_second, network, speeds.server_seconds)


def most_useful_machines(speeds: Speeds, per_round: int, round_bytes: int = 0) -> int:
    """Return how many machines make training as short as what they do not shorten, at most one a client."""
    alone = round_time(speeds, per_round, 1, round_bytes)
    fixed = alone.network_seconds + alone.server_seconds
    return per_round if not fixed else min(per_round, max(1, round(alone.train_seconds / fixed)))
