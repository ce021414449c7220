"""Sending a round's clients to machines, and waiting for their replies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fed import interruption
from fed.errors import printable
from fed.flower.watch import Watch

POLL_SECONDS = 0.2, 1.0  # between two looks for replies, at first and at most
NO_ROUND = -1  # the base of a machine is as after no round that the server's was
# Between two looks which machines are connected: while messages are under way, and while only machines are waited for.
LOOK_SECONDS, WAIT_SECONDS = 2.0, 1.0
BUSY_SECONDS = 120.0  # for a SuperLink to answer again that fails, as with a database locked while it is overloaded

T = TypeVar("T")


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
    """A message under way, or what came of it: a reply's content, or the reason why there is none.

    From the moment `until` on, in seconds of `time.monotonic`, it is late and no longer waited for.
    """

    node: Node
    message: Message
    content: RecordDict | None = None
    fault: str | None = None
    lost: bool = False  # the machine is gone, or failed without the clients being the reason
    unreadable: bool = False  # there is a reply, and its content cannot be unpacked
    until: float = field(default=math.inf)

    def take(self, reply: Message) -> None:
        """Take the reply to the message: its content, or the error in its place."""
        if reply.has_error():
            reason = printable(str(reply.error.reason or reply.error.code))[:400]
            self.fault, self.lost = f"its machine failed: {reason}", True
        else:
            self.content = reply.content


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


class Play(Protocol):
    """What messages are sent for."""

    @property
    def waits(self) -> bool:
        """Whether there is something to wait for; if there is not, the exchange ends."""

    def looked(self, connected: set[int]) -> Iterable[Sent]:
        """Take the numbers of the machines that are connected, and return messages to send."""

    def ended(self, one: Sent) -> None:
        """Take a message that has a reply, or a reason why it has none; a look follows."""


class Post:
    """The messages that are under way on a grid, from one exchange to the next."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._under_way: dict[str, Sent] = {}
        self._watch = Watch(self._pushed, self._pulled)

    def exchange(self, play: Play) -> None:
        """Send what a play wants sent, and give it what comes of that, until it waits for nothing more.

        A machine that is no longer connected is `lost`. What is under way then stays so until the next exchange.
        """
        looked = -math.inf
        pause, longest = POLL_SECONDS
        while True:
            interruption.check()
            now = time.monotonic()
            ended = [*self._answers(), *self._late(now)]
            sent = False
            if ended or now - looked >= (LOOK_SECONDS if self._under_way else WAIT_SECONDS):
                looked = now
                connected = set(_insisting(self._grid.get_node_ids))
                ended += [*self._gone(connected), *self._lost(now)]
                for one in ended:
                    play.ended(one)
                for one in play.looked(connected):
                    if self._push(one):
                        sent = True
                    else:
                        play.ended(one)
                        looked = -math.inf
            if not play.waits:
                return
            pause = POLL_SECONDS[0] if ended else min(longest, pause * 1.2)
            if not sent:
                time.sleep(pause)

    def _push(self, one: Sent) -> bool:
        """Send a message by itself, because it may be large; return whether it was taken."""
        number = self._pushed(one.message)
        if not number:
            one.fault, one.lost = "the SuperLink did not take the message", True
            return False
        self._under_way[number] = one
        return True

    def _pushed(self, message: Message) -> str:
        """Return the number under which the SuperLink takes a message, "" if it does not."""
        (number,) = _insisting(lambda: list(self._grid.push_messages([message]))) or [""]
        return str(number or "")

    def _answers(self) -> list[Sent]:
        if not self._under_way:
            return []
        found = [self._answered(reply) for reply in self._pulled(list(self._under_way))]
        return [one for one in found if one is not None] + self._unreadable()

    def _pulled(self, numbers: Sequence[str]) -> list[Message]:
        """Return the replies to messages; a reply that Flower cannot unpack is noted, and loses no other one."""
        try:
            return list(_insisting(lambda: self._grid.pull_messages(numbers)))
        except (OSError, MemoryError, httpx.HTTPError):  # not of a reply
            raise
        except Exception as error:
            if len(numbers) == 1:
                if (one := self._under_way.get(numbers[0])) is not None:  # none is of a question of the watch
                    one.fault, one.unreadable = f"its reply cannot be unpacked: {printable(str(error))[:400]}", True
                return []
        return [reply for number in numbers for reply in self._pulled([number])]

    def _unreadable(self) -> list[Sent]:
        return self._ended([number for number, one in self._under_way.items() if one.unreadable])

    def _answered(self, reply: Message) -> Sent | None:
        """Return what a reply answers; None if that is answered already or was never asked."""
        one = self._under_way.pop(reply.metadata.reply_to_message_id, None)
        if one is None:
            return None
        one.take(reply)
        return one

    def _gone(self, connected: set[int]) -> list[Sent]:
        gone = [number for number, one in self._under_way.items() if one.node.number not in connected]
        return self._ended(gone, "its machine is no longer connected", lost=True)

    def _lost(self, now: float) -> list[Sent]:
        lost = self._watch.lost({number: one.node.number for number, one in self._under_way.items()}, now)
        return self._ended(lost, "its machine has lost the message", lost=True)

    def _late(self, now: float) -> list[Sent]:
        return self._ended(
            [number for number, one in self._under_way.items() if now >= one.until], "it did not answer in time"
        )

    def _ended(self, numbers: Iterable[str], fault: str | None = None, lost: bool = False) -> list[Sent]:
        """Return messages that have no reply that can be read, and from now on wait for none."""
        ended = [self._under_way.pop(number) for number in numbers]
        for one in ended:
            one.fault, one.lost = fault or one.fault, lost
        return ended


def _insisting(call: Callable[[], T]) -> T:
    """Return what a call of the SuperLink returns, which is made again while that answers with an error of its own."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return call()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500 or time.monotonic() > until:
                raise
        interruption.check()
        time.sleep(1)
