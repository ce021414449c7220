"""Where the clients of a round train, if not in the process that plays the rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from fed.types import Client, ClientResult, RunState

if TYPE_CHECKING:
    from fed.simulation.rounds import Federation


class Executor(Protocol):
    """The training of a run's clients on other machines; `Federation` does everything else of a round."""

    def clients(self, federation: Federation) -> tuple[Client, ...] | None:
        """Return all clients as they are before the first round; None if the configuration says which there are."""

    def train(self, federation: Federation, state: RunState, clients: Sequence[Client]) -> list[ClientResult]:
        """Train the clients in the round after `state`; return the checked results of those that answered in time.

        The results come in the order of the clients.
        """

    def close(self) -> None:
        """End what the executor began, whether the run is over or has failed."""
