"""The training of a run's clients on the machines that Flower connects (`fed.simulation.rounds.Executor`)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fed.errors import FedError, printable
from fed.flower.bundles import bundled
from fed.flower.dispatch import NO_ROUND, Node, Post, Sent
from fed.flower.joining import STATE, invitation, key_of, why_not
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
from fed.flower.replies import Asked, left_out, reply_of, why_lacking
from fed.flower.round_in_play import RoundInPlay, RoundMessage
from fed.sealed import read_sealed, write_sealed
from fed.simulation.checkpoint import last_round
from fed.simulation.clients import local_steps
from fed.simulation.rounds import Federation
from fed.types import Client, ClientResult, RunState

JOIN_SECONDS = 3600.0  # for a machine to load data and base
_TOLD = ("id", "rank", "n_samples", "last_round", "kept_round")  # what a machine is told of a client


class FlowerTraining:
    """Trains clients on the SuperNodes of a grid: many on each in a simulation, its own one on each in a deployment.

    `directory` returns the run's directory, which moves into its place with the first row. `on_event` receives
    messages about machines.
    """

    def __init__(self, grid: Grid, directory: Callable[[], Path], on_event: Callable[[str], object]) -> None:
        self._post, self._directory, self.tell = Post(grid), directory, on_event
        self.nodes: dict[int, Node] = {}
        self._invited: dict[int, Sent] = {}
        self._refused: set[int] = set()
        self._second: dict[int, int] = {}  # a machine that says it is the client that another one is, and that one
        self._absent: dict[int, float] = {}
        self._key = ""
        self._joining: RecordDict | None = None

    # The Executor's interface.

    def clients(self, federation: Federation) -> tuple[Client, ...] | None:
        """Wait for the machines; in a deployment return the clients that they are.

        A run that goes on has the clients that it began with, and waits for `engine.nodes` machines alone: the rounds
        wait for those that they need. Raises FedError if fewer than `engine.nodes` machines, or at the beginning of a
        deployment than `clients.count`, joined within `engine.wait` seconds.
        """
        engine = federation.config.engine
        deployed = engine.mode == "deployment"
        begun = self._begun() if deployed else None
        wanted = max(engine.nodes, federation.config.clients.count if deployed and begun is None else 1)
        gathering = _Gathering(self, federation, wanted)
        self._post.exchange(gathering)
        if len(self.nodes) < wanted:
            what = f"clients.count is {wanted}" if wanted > engine.nodes else f"engine.nodes is {wanted}"
            raise FedError(
                f"{what}, and {len(self.nodes)} SuperNodes have joined after engine.wait = {engine.wait} s; more "
                "of them, or a longer wait, would be right"
            )
        if not deployed:
            return None
        said = begun or sorted((node.facts["client"] for node in self.nodes.values()), key=lambda own: int(own["id"]))
        if begun is None:
            own = [{name: client.get(name) for name in ("id", "rank", "rows", "own_rows")} for client in said]
            write_sealed(self._directory() / STATE, {"run": self._key, "clients": own})
        return tuple(Client(own["id"], own["rank"], own["rows"], own_rows=own.get("own_rows") is True) for own in said)

    def train(self, federation: Federation, state: RunState, clients: Sequence[Client]) -> list[ClientResult]:
        """Train the clients on the machines; return the results of those that answered in time.

        What happens when a machine is lost is in `RoundInPlay`.
        """
        play = self.begin(federation, state, clients)
        self._post.exchange(play)
        return [play.found[client.id] for client in clients if client.id in play.found]

    def begin(self, federation: Federation, state: RunState, clients: Sequence[Client]) -> RoundInPlay:
        """Return the training of clients in the round after `state`, of which nothing is sent yet."""
        return RoundInPlay(_Round(self, federation, state), federation.config.engine, clients, self._absent)

    # Machines.

    def look(self, connected: Collection[int], federation: Federation) -> list[Sent]:
        """Forget the machines that are gone, and return invitations for those that are new."""
        for gone in self.nodes.keys() - connected:
            del self.nodes[gone]
        self._second = {number: first for number, first in self._second.items() if first in self.nodes}
        known = self.nodes.keys() | self._refused | self._invited.keys() | self._second.keys()
        new = sorted(set(connected) - known)
        for number in new:
            message = Message(self._invitation(federation), number, JOIN, ttl=JOIN_SECONDS, group_id="join")
            self._invited[number] = Sent(Node(number, {}), message, until=time.monotonic() + JOIN_SECONDS)
        return [self._invited[number] for number in new]

    @property
    def joining(self) -> bool:
        """Whether a machine was invited and has not answered yet."""
        return bool(self._invited)

    def lose(self, node: Node) -> None:
        """Forget a machine, which is invited again if it is still connected."""
        self.nodes.pop(node.number, None)

    def admit(self, one: Sent, federation: Federation) -> None:
        """Take a machine that answered into the run, or say why it is not."""
        node = one.node
        del self._invited[node.number]
        why = one.fault
        if one.content is not None:
            try:
                node.facts = facts_of(one.content)
                why = why_not(node.facts, federation, self._key) or self._why_second(node, federation)
            except RecordError as error:
                why = str(error)
        if why is None:
            self.nodes[node.number] = node
            if (other := node.facts["versions"].get("torch")) != versions()["torch"]:
                self.tell(f"SuperNode {node.number} has torch {printable(str(other))[:40]}: it may round otherwise")
            if isinstance(unread := node.facts.get("unread"), list) and unread:
                names = printable(", ".join(map(str, unread)))[:200]
                self.tell(f"SuperNode {node.number}: a run does not read {names} of its node config")
            return
        if not one.lost and node.number not in self._second:
            self._refused.add(node.number)
        self.tell(f"SuperNode {node.number} does not take part: {printable(why)[:800]}")

    def _why_second(self, node: Node, federation: Federation) -> str | None:
        """Note which client a machine is, in a deployment; return why it cannot be if another one is that already."""
        if federation.config.engine.mode == "simulation":
            return None
        client = node.facts["client"]["id"]
        for other in self.nodes.values():
            if other.client == client:
                # A SuperNode that was killed counts as connected for a minute, while another may stand in for it.
                self._second[node.number] = other.number
                return (
                    f"its partition-id is {client}, as that of SuperNode {other.number}; each has one of its own, and "
                    "it is asked again once that one is gone"
                )
        node.client = client
        return None

    def _invitation(self, federation: Federation) -> RecordDict:
        """Return what a machine needs to join; the run's key is known from then on."""
        if self._joining is None:
            self._key = key_of(self._directory())
            self._joining = invitation(federation, self._key, self._directory())
        return self._joining

    # Rounds.

    def write(self, federation: Federation, state: RunState, clients: Sequence[Client], node: Node) -> RoundMessage:
        """Return the message that has clients trained by a machine."""
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
            "clients": [{name: getattr(own, name) for name in _TOLD} for own in clients],
        }
        content = RecordDict({FACTS: facts_record(facts)})
        for name, record in server_records(state.server, base).items():
            content[name] = record
        if not keeps:
            for own in clients:
                if tensors := client_tensors(own):
                    content[f"kept-{own.id}"] = arrays_of(tensors)
        # After the deadline nobody waits for it, and a machine that comes to it late is not to train for nothing.
        lasts = federation.config.engine.deadline or None
        message = Message(bundled(content), node.number, TRAIN, ttl=lasts, group_id=str(asked.round))
        return RoundMessage(node, message, asked, base_round)

    def results(self, one: RoundMessage, federation: Federation, state: RunState) -> list[ClientResult]:
        """Return the checked results of a reply, one for each of its clients."""
        if one.content is None:
            fault = one.fault or "its reply cannot be read"
            return [left_out(federation, state, client, fault) for client in one.asked.clients]
        reply = reply_of(one.content, one.asked, federation, state)
        if reply.answers:
            one.node.base_round = one.base_round
            one.node.speed = reply.speed or one.node.speed
        return reply.results

    def _begun(self) -> list[dict[str, int]] | None:
        """Return the clients that a deployment began with; None if it begins now."""
        directory = self._directory()
        path = directory / STATE
        if last_round(directory) is None or not path.is_file():
            return None
        found: list[dict[str, int]] | None = read_sealed(path).get("clients")
        return found


class _Gathering:
    """The wait for the machines of a run (`fed.flower.dispatch.Play`)."""

    def __init__(self, training: FlowerTraining, federation: Federation, wanted: int) -> None:
        self._training, self._federation, self._wanted = training, federation, wanted
        self._until = time.monotonic() + federation.config.engine.wait
        self._told = -1

    @property
    def waits(self) -> bool:
        """Whether more machines are wanted, and there is time or one that was invited may still join."""
        return len(self._training.nodes) < self._wanted and (time.monotonic() < self._until or self._training.joining)

    def looked(self, connected: set[int]) -> list[Sent]:
        """Return invitations for new machines."""
        count = len(self._training.nodes)
        if count < self._wanted and count != self._told:
            self._told = count
            self._training.tell(f"{count} of {self._wanted} SuperNodes have joined; waiting for more")
        return self._training.look(connected, self._federation)

    def ended(self, one: Sent) -> None:
        """Take a machine's answer."""
        self._training.admit(one, self._federation)


class _Round:
    """The machines as the round after `state` needs them (`fed.flower.round_in_play.Machines`)."""

    def __init__(self, training: FlowerTraining, federation: Federation, state: RunState) -> None:
        self._training, self._federation, self._state = training, federation, state

    @property
    def nodes(self) -> Mapping[int, Node]:
        return self._training.nodes

    @property
    def joining(self) -> bool:
        return self._training.joining

    def look(self, connected: Collection[int]) -> list[Sent]:
        return self._training.look(connected, self._federation)

    def lose(self, node: Node) -> None:
        self._training.lose(node)

    def admit(self, one: Sent) -> None:
        self._training.admit(one, self._federation)

    def write(self, clients: Sequence[Client], node: Node) -> RoundMessage:
        return self._training.write(self._federation, self._state, clients, node)

    def lacks(self, one: RoundMessage) -> str:
        assert one.content is not None
        return why_lacking(one.content)

    def results(self, one: RoundMessage) -> list[ClientResult]:
        return self._training.results(one, self._federation, self._state)

    def steps(self, client: Client) -> int:
        return local_steps(self._federation.config, client)

    def tell(self, message: str) -> None:
        self._training.tell(f"round {self._state.server.round + 1}: {message}")


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
