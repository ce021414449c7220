"""Aggregation that leaves out updates with which the server's state would be unusable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from fed.simulation.round_metrics import Evaluation
from fed.types import ClientResult, ServerState


class Candidate(NamedTuple):
    """A server's state after aggregation, with its evaluation; `fault` is the reason why it is unusable, or None."""

    server: ServerState
    evaluation: Evaluation | None
    fault: str | None


class Aggregated(NamedTuple):
    """The usable state, or None if no update gives one, and the results, with faults for those left out."""

    chosen: Candidate | None
    results: list[ClientResult]


def aggregate_usable(
    results: Sequence[ClientResult],
    growth: Callable[[ClientResult], float],
    attempt: Callable[[Sequence[ClientResult]], Candidate],
) -> Aggregated:
    """Aggregate as many of the results without a fault as give a usable state.

    `attempt` aggregates some of the results, in their order. If the state is unusable, results are left out in order of
    decreasing `growth` (equal ones in their order) until it is usable. Then those left out before the last one are
    tried again, the one that grew least first, so that an update that only grew more than an unusable one counts after
    all. Each result that stays left out has the reason for it as its fault. Without an unusable update `attempt` is
    called once, and with one twice.
    """
    kept = [place for place, result in enumerate(results) if result.fault is None]
    if not kept:
        return Aggregated(None, list(results))

    def attempt_with(places: Sequence[int]) -> Candidate:
        return attempt([results[place] for place in sorted(places)])

    chosen: Candidate | None = attempt_with(kept)
    grown = {place: growth(results[place]) for place in kept} if chosen is not None and chosen.fault else {}
    left_out: list[int] = []
    reasons: dict[int, str] = {}
    while chosen is not None and chosen.fault is not None:
        worst = max(kept, key=lambda place: grown[place])
        kept.remove(worst)
        left_out.append(worst)
        reasons[worst] = chosen.fault
        chosen = attempt_with(kept) if kept else None
    for place in reversed(left_out[:-1]):
        candidate = attempt_with([*kept, place])
        if candidate.fault is None:
            chosen = candidate
            kept.append(place)
            del reasons[place]
        else:
            reasons[place] = candidate.fault
    return Aggregated(
        chosen,
        [replace(result, fault=reasons.get(place, result.fault)) for place, result in enumerate(results)],
    )
