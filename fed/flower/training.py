"""The training of a run's clients on the machines that Flower connects (`fed.simulation.rounds.Executor`)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fed import interruption
from fed.errors import FedError, printable
from fed.flower.dispatch import NO_ROUND, Node, Sent, divide, exchange
from fed.flower.joining import invitation, key_of, why_not
from fed.flower.protocol import JOIN, TRAIN, versions
from fed.flower.records import (
    ADDED,
    FACTS,
    KNOWN,
    WHOLE,
    RecordError,
    arrays_of,
    client_tensors,
    facts_of,
    facts_record,
    server_records,
)
from fed.flower.replies import Asked, reply_of, why_lacking
from fed.simulation.clients import local_steps
from fed.simulation.rounds import Federation
from fed.types import Client, ClientResult, RunState

JOIN_SECONDS = 3600.0  # for a machine to load data and base


class FlowerTraining:
    """Trains clients on the SuperNodes of a grid: many on each in a simulation, its own one on each in a deployment.

    `directory` returns the run's directory, which moves into its place with the first row. `on_event` receives
    messages about machines.
    """

    def __init__(self, grid: Grid, directory: Callable[[], Path], on_event: Callable[[str], object]) -> None:
        self._grid, self._directory, self._tell = grid, directory, on_event
        self._nodes: dict[int, Node] = {}
        self._refused: set[int] = set()
        self._key = ""
        self._joining: RecordDict | None = None

    # The Executor's interface.

    def clients(self, federation: Federation) -> tuple[Client, ...] | None:
        """Wait for the machines; in a deployment return the clients that they are.

        Raises FedError if fewer than `engine.nodes` machines, or in a deployment than `clients.count`, joined within
        `engine.wait` seconds.
        """
        engine = federation.config.engine
        deployed = engine.mode == "deployment"
        wanted = max(engine.nodes, federation.config.clients.count if deployed else 1)
        began = time.monotonic()
        told = -1
        while len(self._look_around(federation)) < wanted:
            interruption.check()
            if time.monotonic() - began >= engine.wait:
                what = f"clients.count is {wanted}" if deployed else f"engine.nodes is {wanted}"
                raise FedError(
                    f"{what}, and {len(self._nodes)} SuperNodes have joined after engine.wait = {engine.wait} s; more "
                    "of them, or a longer wait, would be right"
                )
            if told != len(self._nodes):
                told = len(self._nodes)
                self._tell(f"{told} of {wanted} SuperNodes have joined; waiting for more")
            time.sleep(1)
        if not deployed:
            return None
        said = sorted((node.facts["client"] for node in self._nodes.values()), key=lambda own: int(own["id"]))
        return tuple(Client(own["id"], own["rank"], own["rows"]) for own in said)

    def train(self, federation: Federation, state: RunState, clients: Sequence[Client]) -> list[ClientResult]:
        """Train the clients on the machines that are connected; return the results of those that answered in time.

        In a simulation the clients of a machine that is lost are sent to another one, once.
        """
        deadline = federation.config.engine.deadline
        began = time.monotonic()
        found: dict[int, ClientResult] = {}
        tried_again: set[int] = set()
        jobs = {client.id: client for client in clients}

        def on_end(one: _Round) -> Iterable[Sent]:
            missing = one.clients
            if one.content is not None:
                if lacks := why_lacking(one.content):
                    return self._joined_again(one, lacks, federation, state)
                for result in self._results(one, federation, state):
                    found.setdefault(result.client.id, result)
                missing = []
            if one.lost:
                self._nodes.pop(one.node.number, None)
            if not missing or not one.lost or federation.config.engine.mode == "deployment":
                self._tell_lost(state, missing, one.fault)
                return ()
            again = [client for client in missing if client.id not in tried_again]
            self._tell_lost(state, [client for client in missing if client.id in tried_again], one.fault)
            tried_again.update(client.id for client in again)
            nodes = self._look_around(federation)
            if again and nodes:
                where = ", ".join(str(client.id) for client in again[:8]) + (", …" if len(again) > 8 else "")
                self._tell(f"round {state.server.round + 1}: {one.fault}; clients {where} are sent elsewhere")
                return self._messages(federation, state, again, nodes)
            self._tell_lost(state, again, one.fault)
            return ()

        nodes = self._look_around(federation)
        while not nodes and time.monotonic() - began < federation.config.engine.wait:
            interruption.check()
            time.sleep(1)
            nodes = self._look_around(federation)
        if not nodes:
            self._tell(f"round {state.server.round + 1}: no SuperNode is connected")
            return []
        sent = self._messages(federation, state, clients, nodes)
        reached = {client.id for one in sent for client in one.clients}
        self._tell_lost(state, [own for own in clients if own.id not in reached], "its SuperNode is not connected")
        exchange(self._grid, sent, deadline, on_end)  # type: ignore[arg-type]
        for one in sent:
            if one.fault is not None and not one.lost and "deadline" in one.fault:
                self._tell_lost(state, [own for own in one.clients if own.id not in found], one.fault)
        return [found[number] for number in jobs if number in found]

    def close(self) -> None:
        """End what the executor began; the machines end theirs with Flower's run."""

    # Machines.

    def _look_around(self, federation: Federation) -> list[Node]:
        """Return the machines that are connected and have joined; those that are new are asked to."""
        connected = set(self._grid.get_node_ids())
        for gone in self._nodes.keys() - connected:
            del self._nodes[gone]
        new = sorted(connected - self._nodes.keys() - self._refused)
        if new:
            asked = [
                Sent(Node(number, {}), self._message(self._invitation(federation), number, JOIN)) for number in new
            ]
            exchange(self._grid, asked, JOIN_SECONDS)
            for one in asked:
                self._admit(one, federation)
        return [self._nodes[number] for number in sorted(self._nodes)]

    def _admit(self, one: Sent, federation: Federation) -> None:
        """Take a machine that answered into the run, or say why it is not."""
        node = one.node
        why = one.fault
        if one.content is not None:
            try:
                node.facts = facts_of(one.content)
                why = why_not(node.facts, federation, self._key, self._nodes.values())
            except RecordError as error:
                why = str(error)
        if why is None:
            if federation.config.engine.mode == "deployment":
                node.client = node.facts["client"]["id"]
            self._nodes[node.number] = node
            if (other := node.facts["versions"].get("torch")) != versions()["torch"]:
                self._tell(f"SuperNode {node.number} has torch {printable(str(other))[:40]}: it may round otherwise")
            return
        if not one.lost:
            self._refused.add(node.number)
        self._tell(f"SuperNode {node.number} does not take part: {printable(why)[:800]}")

    def _invitation(self, federation: Federation) -> RecordDict:
        """Return what a machine needs to join; the run's key is known from then on."""
        if self._joining is None:
            self._key = key_of(self._directory())
            self._joining = invitation(federation, self._key, self._directory())
        return self._joining

    # Rounds.

    def _message(self, content: RecordDict, number: int, kind: str, group: str = "join") -> Message:
        return Message(content, number, kind, group_id=group)

    def _messages(
        self, federation: Federation, state: RunState, clients: Sequence[Client], nodes: Sequence[Node]
    ) -> list[_Round]:
        """Return the messages that have clients trained, each with its clients."""
        if federation.config.engine.mode == "deployment":
            own = {node.client: node for node in nodes}
            return [self._round(federation, state, [one], own[one.id]) for one in clients if one.id in own]
        steps = [local_steps(federation.config, client) for client in clients]
        dealt = zip(nodes, divide(steps, [node.speed for node in nodes]), strict=True)
        return [
            self._round(federation, state, [clients[place] for place in places], node)
            for node, places in dealt
            if places
        ]

    def _round(self, federation: Federation, state: RunState, clients: Sequence[Client], node: Node) -> _Round:
        keeps, trial = federation.config.engine.mode == "deployment", _is_trial(state)
        base, before = (WHOLE, None) if trial else _base_for(node, state)
        base_round = NO_ROUND if trial else _base_round(state)
        asked = Asked(self._key, state.server.round + 1, secrets.token_hex(16), list(clients))
        facts = {
            "run": asked.run,
            "round": asked.round,
            "nonce": asked.nonce,
            "keeps": keeps,
            "trial": trial,
            "base_before": before,
            "base_round": base_round,
            "clients": [
                {
                    "id": own.id,
                    "rank": own.rank,
                    "n_samples": own.n_samples,
                    "last_round": own.last_round,
                    "kept_round": own.kept_round,
                }
                for own in clients
            ],
        }
        content = RecordDict({FACTS: facts_record(facts)})
        for name, record in server_records(state.server, base).items():
            content[name] = record
        if not keeps:
            for own in clients:
                if tensors := client_tensors(own):
                    content[f"kept-{own.id}"] = arrays_of(tensors)
        message = self._message(content, node.number, TRAIN, str(asked.round))
        return _Round(node, message, asked, base_round)

    def _joined_again(self, one: _Round, lacks: str, federation: Federation, state: RunState) -> Iterable[Sent]:
        """Let a machine join again that has lost the run, and return its message anew; else its clients are lost."""
        node = one.node
        if lacks in ("the run", "the base") and not one.again:
            self._nodes.pop(node.number, None)
            for fresh in self._look_around(federation):
                if fresh.number == node.number:
                    again = self._round(federation, state, one.clients, fresh)
                    again.again = True
                    return [again]
        self._tell_lost(state, one.clients, f"its machine lacks {printable(lacks)}")
        return ()

    def _results(self, one: _Round, federation: Federation, state: RunState) -> list[ClientResult]:
        """Return the checked results of a reply, one for each of its clients."""
        assert one.content is not None
        reply = reply_of(one.content, one.asked, federation, state)
        if reply.answers:
            one.node.base_round = one.base_round
            one.node.speed = reply.speed or one.node.speed
        return reply.results

    def _tell_lost(self, state: RunState, clients: Iterable[Client], why: str | None) -> None:
        for client in clients:
            self._tell(
                f"round {state.server.round + 1}: client {client.id} gave no update: {why or 'it did not answer'}"
            )


class _Round(Sent):
    """A message of a round: what it asks, and the round whose base the machine has once it has answered."""

    def __init__(self, node: Node, message: Message, asked: Asked, base_round: int) -> None:
        super().__init__(node, message)
        self.asked, self.base_round, self.again = asked, base_round, False

    @property
    def clients(self) -> Sequence[Client]:
        """The clients that it has trained."""
        return self.asked.clients


def _is_trial(state: RunState) -> bool:
    """Return whether the server only tries this state, to see whether a client can train from it.

    It then is a later state under the number of an earlier round (`fed.simulation.rounds.Federation.training_fault`).
    """
    return len(state.server.fold_bytes) > state.server.round


def _base_round(state: RunState, before: int | None = None) -> int:
    """Return the last round, before another one, that folded something into the base; 0 if there is none."""
    sizes = state.server.fold_bytes[: None if before is None else before - 1]
    return next((number for number in range(len(sizes), 0, -1) if sizes[number - 1]), 0)


def _base_for(node: Node, state: RunState) -> tuple[str, int | None]:
    """Return how a machine learns what is folded into the base, and the round whose base it must have for that."""
    last = _base_round(state)
    if node.base_round == last:
        return KNOWN, last
    if state.server.fold and state.server.round == last and node.base_round == _base_round(state, before=last):
        return ADDED, node.base_round
    return WHOLE, None
