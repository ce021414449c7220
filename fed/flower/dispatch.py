"""Sending a round's clients to machines, and waiting for their replies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fed import interruption
from fed.errors import printable

POLL_SECONDS = 0.2, 1.0  # between two looks for replies, at first and at most
NO_ROUND = -1  # the base of a machine is as after no round that the server's was
LOOK_SECONDS = 5.0  # between two looks whether machines are still connected


@dataclass
class Node:
    """A SuperNode that has joined: its number in Flower, and what it said of itself.

    `client` is the client that it is in a deployment. `speed` is how many local steps a second it took last, None
    before its first round. `base_round` is the round after which the base that it holds was as the server's.
    """

    number: int
    facts: dict[str, Any]
    client: int | None = None
    speed: float | None = None
    base_round: int = NO_ROUND


@dataclass
class Sent:
    """A message under way, or what came of it: a reply's content, or the reason why there is none."""

    node: Node
    message: Message
    content: RecordDict | None = None
    fault: str | None = None
    lost: bool = False  # the machine is gone, or failed without the clients being the reason
    seconds: float = field(default=0.0)


def divide(steps: Sequence[int], speeds: Sequence[float | None]) -> list[list[int]]:
    """Return which clients each machine trains, as places in `steps`, so that all end at about the same time.

    `steps` are the clients' local steps, `speeds` the machines' steps a second, None for one that was not measured,
    which is taken to be as fast as the others are on average. Clients go, those with the most steps first, to the
    machine that would be done with them first: the greedy rule of Graham (SIAM J. Appl. Math. 17, 1969), whose last
    machine ends after at most 4/3 of the shortest possible time on machines of equal speed. It is deterministic.

    >>> divide([4, 4, 2, 2], [2.0, 1.0])
    [[0, 1], [2, 3]]
    """
    known = [speed for speed in speeds if speed]
    usual = sum(known) / len(known) if known else 1.0
    rates = [speed or usual for speed in speeds]
    loads = [0] * len(rates)
    dealt: list[list[int]] = [[] for _ in rates]
    for place in sorted(range(len(steps)), key=lambda place: -steps[place]):
        least = min(range(len(rates)), key=lambda machine: ((loads[machine] + steps[place]) / rates[machine], machine))
        loads[least] += steps[place]
        dealt[least].append(place)
    return [sorted(places) for places in dealt]


def exchange(
    grid: Grid, sent: Sequence[Sent], deadline: float, on_end: Callable[[Sent], Iterable[Sent]] | None = None
) -> None:
    """Send messages and wait until each has a reply, or a reason why it has none.

    A machine that is no longer connected is `lost`. After `deadline` seconds, 0 for no limit, those still under way
    are late. `on_end` is called for each message that has ended, and may return messages to send in its place.
    """
    waiting = _pushed(grid, sent)
    for unsent in sent:
        if unsent.fault is not None and on_end is not None:
            waiting |= _pushed(grid, list(on_end(unsent)))
    began = looked = time.monotonic()
    pause, longest = POLL_SECONDS
    while waiting:
        interruption.check()
        ended = [_answered(waiting, reply) for reply in grid.pull_messages(list(waiting))]
        now = time.monotonic()
        if now - looked >= LOOK_SECONDS:
            looked = now
            ended += _gone(waiting, set(grid.get_node_ids()))
        if deadline and now - began >= deadline:
            ended += _late(waiting, deadline)
            on_end = None
        for one in filter(None, ended):
            one.seconds = time.monotonic() - began
            if on_end is not None:
                waiting |= _pushed(grid, list(on_end(one)))
        if waiting:
            pause = POLL_SECONDS[0] if any(ended) else min(longest, pause * 1.2)
            time.sleep(min(pause, max(0.01, began + deadline - now) if deadline else math.inf))


def _pushed(grid: Grid, sent: Sequence[Sent]) -> dict[str, Sent]:
    """Send messages, one at a time because they may be large; return them by the numbers that replies refer to."""
    waiting = {}
    for one in sent:
        (number,) = list(grid.push_messages([one.message])) or [""]
        if not number:
            one.fault, one.lost = "the SuperLink did not take the message", True
        else:
            waiting[str(number)] = one
    return waiting


def _answered(waiting: dict[str, Sent], reply: Message) -> Sent | None:
    """Return what a reply answers; None if that is answered already or was never asked."""
    one = waiting.pop(reply.metadata.reply_to_message_id, None)
    if one is None:
        return None
    if reply.has_error():
        reason = printable(str(reply.error.reason or reply.error.code))[:400]
        one.fault, one.lost = f"its machine failed: {reason}", True
    else:
        one.content = reply.content
    return one


def _gone(waiting: dict[str, Sent], connected: set[int]) -> list[Sent]:
    lost = [number for number, one in waiting.items() if one.node.number not in connected]
    for number in lost:
        waiting[number].fault, waiting[number].lost = "its machine is no longer connected", True
    return [waiting.pop(number) for number in lost]


def _late(waiting: dict[str, Sent], deadline: float) -> list[Sent]:
    late = list(waiting.values())
    waiting.clear()
    for one in late:
        one.fault = f"it did not answer within engine.deadline ({deadline:g} s)"
    return late
