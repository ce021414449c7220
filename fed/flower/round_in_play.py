"""A round whose clients train on machines: who is sent where, and what happens when a machine is lost meanwhile."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from flwr.app import Message

from fed.config.engine import EngineConfig
from fed.flower.dispatch import Node, Sent, divide
from fed.flower.replies import Asked
from fed.types import Client, ClientResult

# From when on a message is slow: after so many times what its machine should need, and at least so many seconds; of a
# machine that was not measured yet, after so many seconds.
SLOW_FACTOR, SLOW_SECONDS, UNMEASURED_SECONDS = 4.0, 60.0, 1800.0


class RoundMessage(Sent):
    """A message of a round: what it asks, and the round whose base the machine has once it has answered."""

    def __init__(self, node: Node, message: Message, asked: Asked, base_round: int) -> None:
        super().__init__(node, message)
        self.asked, self.base_round = asked, base_round
        self.slow_from = math.inf  # in seconds of `time.monotonic`

    @property
    def clients(self) -> Sequence[Client]:
        """The clients that it has trained."""
        return self.asked.clients


class Machines(Protocol):
    """The machines of a run, as one round needs them."""

    @property
    def nodes(self) -> Mapping[int, Node]:
        """The machines that have joined and not been lost, by number."""

    @property
    def joining(self) -> bool:
        """Whether a machine is asked to join and has not answered yet."""

    def look(self, connected: Collection[int]) -> list[Sent]:
        """Forget machines that are gone, and return invitations for those that are new."""

    def lose(self, node: Node) -> None:
        """Forget a machine, which is asked to join again if it is still connected."""

    def admit(self, one: Sent) -> None:
        """Take a machine that answered an invitation into the run, or say why it is not."""

    def write(self, clients: Sequence[Client], node: Node) -> RoundMessage:
        """Return the message that has clients trained by a machine."""

    def lacks(self, one: RoundMessage) -> str:
        """Return what a machine said that it lacks to train, or ""."""

    def results(self, one: RoundMessage) -> list[ClientResult]:
        """Return the checked results of a reply, one for each of its clients."""

    def steps(self, client: Client) -> int:
        """Return how many local steps a client takes."""

    def tell(self, message: str) -> None:
        """Take a message about the round."""


class RoundInPlay:
    """The training of some clients on machines (`fed.flower.dispatch.Play`); `found` are the results by client.

    A client whose machine is lost, or has lost the run, is sent again `engine.resends` times: in a simulation to the
    machines that are there, in a deployment to its own machine once that is back. It is waited for until the round's
    deadline, and at most `engine.wait` seconds. `absent` holds since when the machine of a client is missing, in
    seconds of `time.monotonic`, from round to round: who has been waited for so long is waited for no more.
    """

    def __init__(
        self, machines: Machines, engine: EngineConfig, clients: Sequence[Client], absent: dict[int, float]
    ) -> None:
        self.found: dict[int, ClientResult] = {}
        self._machines, self._engine, self._absent = machines, engine, absent
        self._deployed = engine.mode == "deployment"
        self._waiting = {client.id: client for client in clients}
        self._under_way: list[RoundMessage] = []
        self._sent: Counter[int] = Counter()
        self._since = time.monotonic()  # when the machines were last all that was wanted of a simulation
        self._until = self._since + engine.deadline if engine.deadline else math.inf

    @property
    def waits(self) -> bool:
        """Whether a client is under way or waits for a machine."""
        return bool(self._waiting or self._under_way)

    def looked(self, connected: set[int]) -> list[Sent]:
        """Return invitations for new machines, and messages for the clients whose machines are there."""
        invitations = self._machines.look(connected)
        self._tell_slow()
        self._give_up()
        return [*invitations, *self._messages()]

    def ended(self, one: Sent) -> None:
        """Take the results of a reply; clients of a machine that was lost wait for one again."""
        if not isinstance(one, RoundMessage):
            self._machines.admit(one)
            return
        self._under_way = [other for other in self._under_way if other is not one]
        lacks = "" if one.content is None else self._machines.lacks(one)
        if one.unreadable or (one.content is not None and not lacks):
            for result in self._machines.results(one):
                self.found.setdefault(result.client.id, result)
            return
        if one.content is not None:
            one.fault = f"its machine lacks {lacks}"
            one.lost = lacks in ("the run", "the base")
        if not one.lost:
            self._tell_lost(one.clients, one.fault)
            return
        self._machines.lose(one.node)
        self._since = time.monotonic()
        again = [client for client in one.clients if self._sent[client.id] <= self._engine.resends]
        self._tell_lost([client for client in one.clients if client not in again], one.fault)
        self._waiting |= {client.id: client for client in again}
        if again:
            where = "once its SuperNode is back" if self._deployed else "elsewhere"
            self._machines.tell(f"{one.fault}; sent again {where}: {_named(again)}")

    def _messages(self) -> list[RoundMessage]:
        nodes = [self._machines.nodes[number] for number in sorted(self._machines.nodes)]
        clients = list(self._waiting.values())
        dealt: Iterable[tuple[Node, list[Client]]]
        if self._deployed:
            own = {node.client: node for node in nodes}
            dealt = [(own[client.id], [client]) for client in clients if client.id in own]
        elif not nodes or (self._machines.joining and not self._has_waited()):
            return []
        else:
            shares = divide([self._machines.steps(client) for client in clients], [node.speed for node in nodes])
            dealt = [(node, [clients[place] for place in own]) for node, own in zip(nodes, shares, strict=True) if own]
        messages: list[RoundMessage] = []
        for node, share in dealt:
            message = self._machines.write(share, node)
            message.until = self._until
            message.slow_from = time.monotonic() + self._usual_seconds(share, node)
            messages.append(message)
            for client in share:
                del self._waiting[client.id]
                self._sent[client.id] += 1
        self._under_way += messages
        return messages

    def _usual_seconds(self, clients: Sequence[Client], node: Node) -> float:
        if not node.speed:
            return UNMEASURED_SECONDS
        return max(SLOW_SECONDS, SLOW_FACTOR * sum(map(self._machines.steps, clients)) / node.speed)

    def _tell_slow(self) -> None:
        """Say once of each message that is slow, because a long wait should not be a silent one."""
        now = time.monotonic()
        for one in self._under_way:
            if now >= one.slow_from:
                one.slow_from = math.inf
                bound = "" if self._engine.deadline else ": engine.deadline would bound that"
                who = f"SuperNode {one.node.number} is slow"
                self._machines.tell(f"{who}; waiting until it answers or is gone{bound}: {_named(one.clients)}")

    def _has_waited(self) -> bool:
        return time.monotonic() - self._since >= self._engine.wait

    def _give_up(self) -> None:
        """Leave clients out that have waited for a machine for as long as they may."""
        now = time.monotonic()
        if now >= self._until:
            self._leave_out(list(self._waiting.values()), "its SuperNode did not come back in time")
        elif self._deployed:
            there = {node.client for node in self._machines.nodes.values()}
            for number in self._absent.keys() & there:
                del self._absent[number]
            missing = [client for client in self._waiting.values() if client.id not in there]
            if new := [client for client in missing if client.id not in self._absent and self._engine.wait]:
                self._machines.tell(f"waiting up to {self._engine.wait} s for the SuperNode of {_named(new)}")
            since = {client.id: self._absent.setdefault(client.id, now) for client in missing}
            late = [client for client in missing if now - since[client.id] >= self._engine.wait]
            self._leave_out(late, "its SuperNode is not connected")
        elif not self._machines.nodes and self._has_waited():
            self._leave_out(list(self._waiting.values()), "no SuperNode is connected")

    def _leave_out(self, clients: Sequence[Client], why: str) -> None:
        for client in clients:
            del self._waiting[client.id]
        self._tell_lost(clients, why)

    def _tell_lost(self, clients: Sequence[Client], why: str | None) -> None:
        for client in clients:
            if client.id not in self.found:
                self._machines.tell(f"client {client.id} gave no update: {why or 'it did not answer'}")


def _named(clients: Sequence[Client]) -> str:
    numbers = ", ".join(str(client.id) for client in clients[:8]) + (", …" if len(clients) > 8 else "")
    return f"client {numbers}" if len(clients) == 1 else f"clients {numbers}"
