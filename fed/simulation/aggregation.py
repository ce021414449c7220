"""Aggregation that leaves out updates with which the server's state would be unusable, and needs some that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from fed.simulation.round_metrics import Evaluation
from fed.types import ClientResult, ServerState

TOO_FEW = "too few updates are usable"


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


def enough(results: Sequence[ClientResult], least: int) -> list[ClientResult]:
    """Return the results, with a fault for each of the usable ones if there are fewer than `least` of them."""
    usable = sum(result.fault is None for result in results)
    if usable >= least:
        return list(results)
    fault = f"{TOO_FEW}: {usable} of {least} that server.min_updates asks for"
    return [replace(result, fault=result.fault or fault) for result in results]


def told(results: Sequence[ClientResult], most: float) -> list[str]:
    """Return what is to be said of a round's updates: each that is left out, and how many are clipped or too few.

    `most` is the norm to which updates are clipped.
    """
    few = next((result.fault for result in results if result.fault and result.fault.startswith(TOO_FEW)), None)
    lines = [
        f"client {result.client.id} is left out: {result.fault}"
        for result in results
        if result.fault is not None and result.fault != few
    ]
    clipped = [result.client.id for result in results if result.fault is None and result.clipped]
    if clipped:
        named = f"{', '.join(map(str, clipped[:8]))}{', …' if len(clipped) > 8 else ''}"
        lines.append(
            f"{len(clipped)} of {len(results)} updates are clipped to server.max_update_norm = "
            f"{most:g}: of client {named}"
        )
    if all(result.fault is not None for result in results):
        lines.append(f"{few or 'no client sent a usable update'}; the server keeps its state")
    return lines
