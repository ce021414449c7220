"""What a provider of a case does: train every client of the cohort a step, and show what came of it."""

from __future__ import annotations

from typing import Protocol

from bench.simulation.problem import Values


class Trainer(Protocol):
    """A provider made ready for one case. Names of values are those of `Problem.starts`."""

    def step(self) -> None:
        """Train every client one step: forward, backward, optimiser."""

    def gradients(self) -> list[Values]:
        """Return the gradients of every client's values where it stands; nothing moves."""

    def values(self) -> list[Values]:
        """Return every client's values where it stands."""
