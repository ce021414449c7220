"""The training of a run's clients on the machines that Flower connects (`fed.simulation.rounds.Executor`)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fed.errors import FedError, printable
from fed.files import make_folder
from fed.flower.dispatch import Node, Post, Sent
from fed.flower.protocol import JOIN, TRAIN, versions, why_other_version
from fed.flower.records import (
    ADDED,
    FACTS,
    KNOWN,
    WHOLE,
    RecordError,
    answer_of,
    arrays_of,
    client_tensors,
    facts_of,
    facts_record,
    server_records,
    with_fixed,
)
from fed.flower.round_in_play import RoundInPlay, RoundMessage
from fed.sealed import read_sealed, write_sealed
from fed.seeding import ClientRandom
from fed.simulation.checkpoint import last_round
from fed.simulation.clients import local_steps
from fed.simulation.noise import factor_noise
from fed.simulation.rounds import Federation
from fed.simulation.run_directory import BASE
from fed.types import Client, ClientResult, RunState

STATE = "flower.json"  # in a run's directory: the key by which machines know the run again
JOIN_SECONDS = 3600.0  # for a machine to load data and base


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
            own = [{name: client[name] for name in ("id", "rank", "rows")} for client in said]
            write_sealed(self._directory() / STATE, {"run": self._key, "clients": own})
        return tuple(Client(own["id"], own["rank"], own["rows"]) for own in said)

    def train(self, federation: Federation, state: RunState, clients: Sequence[Client]) -> list[ClientResult]:
        """Train the clients on the machines; return the results of those that answered in time.

        What happens when a machine is lost is in `RoundInPlay`.
        """
        play = RoundInPlay(_Round(self, federation, state), federation.config.engine, clients, self._absent)
        self._post.exchange(play)
        return [play.found[client.id] for client in clients if client.id in play.found]

    def close(self) -> None:
        """End what the executor began; the machines end theirs with Flower's run."""

    # Machines.

    def look(self, connected: Collection[int], federation: Federation) -> list[Sent]:
        """Forget the machines that are gone, and return invitations for those that are new."""
        for gone in self.nodes.keys() - connected:
            del self.nodes[gone]
        self._second = {number: first for number, first in self._second.items() if first in self.nodes}
        known = self.nodes.keys() | self._refused | self._invited.keys() | self._second.keys()
        new = sorted(set(connected) - known)
        for number in new:
            message = self._message(self._invitation(federation), number, JOIN)
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
                why = self._why_not(node, federation)
            except RecordError as error:
                why = str(error)
        if why is None:
            self.nodes[node.number] = node
            if (other := node.facts["versions"].get("torch")) != versions()["torch"]:
                self.tell(f"SuperNode {node.number} has torch {printable(str(other))[:40]}: it may round otherwise")
            return
        if not one.lost and node.number not in self._second:
            self._refused.add(node.number)
        self.tell(f"SuperNode {node.number} does not take part: {printable(why)[:800]}")

    def _why_not(self, node: Node, federation: Federation) -> str | None:
        facts = node.facts
        if why := why_other_version(versions(), facts.get("versions")):
            return why
        if "refused" in facts:
            return str(facts["refused"])
        if facts.get("run") != self._key:
            return "it has joined another run"
        if federation.config.engine.mode == "simulation":
            return None
        client, most = facts.get("client"), federation.config.adapter.rank
        numbers: list[Any] = [client.get(name) for name in ("id", "rank", "rows")] if isinstance(client, dict) else []
        if len(numbers) != 3 or any(type(number) is not int for number in numbers):
            return "it does not say which client it is"
        number, rank, rows = map(int, numbers)
        if not (0 <= number < federation.config.clients.count and 1 <= rank <= most and 1 <= rows < 2**40):
            return f"it says that it is client {number} of rank {rank} with {rows} rows, which cannot be"
        if federation.method.equal_ranks and rank != most:
            return f"its rank is {rank}; {federation.method.title} needs every rank to be adapter.rank ({most})"
        if others := [own for own in self.nodes.values() if own.client == number]:
            # A SuperNode that was killed counts as connected for a minute, while another may stand in for it already.
            self._second[node.number] = others[0].number
            return (
                f"its partition-id is {number}, as that of SuperNode {others[0].number}; each has one of its own, and "
                "it is asked again once that one is gone"
            )
        node.client = number
        return None

    def _invitation(self, federation: Federation) -> RecordDict:
        """Return what a machine needs to join: the settings, the digests of all inputs, and the saved base."""
        if self._joining is None:
            directory = self._directory()
            self._key = _key_of(directory)
            settings = federation.config.model_dump(exclude_none=True, mode="json")
            facts = {
                "run": self._key,
                "versions": versions(),
                "settings": tomli_w.dumps(settings),
                "inputs": dict(federation.inputs),
            }
            base = {
                path.name: torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())
                for path in sorted((directory / BASE).iterdir())
            }
            self._joining = RecordDict({FACTS: facts_record(facts), "base": arrays_of(base)})
        return self._joining

    # Rounds.

    def _message(self, content: RecordDict, number: int, kind: str, group: str = "join") -> Message:
        return Message(content, number, kind, group_id=group)

    def write(self, federation: Federation, state: RunState, clients: Sequence[Client], node: Node) -> RoundMessage:
        """Return the message that has clients trained by a machine."""
        number, keeps = state.server.round + 1, federation.config.engine.mode == "deployment"
        base, before = _base_for(node, state)
        nonce = secrets.token_hex(16)
        facts = {
            "run": self._key,
            "round": number,
            "nonce": nonce,
            "keeps": keeps,
            "base_before": before,
            "base_round": _base_round(state),
            "clients": [
                {"id": own.id, "rank": own.rank, "n_samples": own.n_samples, "last_round": own.last_round}
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
        message = self._message(content, node.number, TRAIN, str(number))
        return RoundMessage(node, message, clients=list(clients), nonce=nonce)

    def results(self, one: RoundMessage, federation: Federation, state: RunState) -> list[ClientResult]:
        """Return the checked results of a reply; say of which clients there is none, and why."""
        content, number = one.content, state.server.round + 1
        assert content is not None
        try:
            facts = facts_of(content)
            self._check_reply(facts, one, number)
        except RecordError as error:
            one.fault = f"its reply cannot be used: {error}"
            return []
        steps = sum(local_steps(federation.config, client) for client in one.clients)
        if isinstance(seconds := facts.get("seconds"), int | float) and 0 < seconds < 1e9:
            one.node.speed = steps / seconds
        one.node.base_round = _base_round(state)
        found = []
        for client in one.clients:
            try:
                found.append(self._result(content, client, federation, state))
            except RecordError as error:
                self.tell(f"round {number}: client {client.id} is left out: {error}")
        return found

    def _check_reply(self, facts: Mapping[str, Any], one: RoundMessage, number: int) -> None:
        """Raise RecordError unless a reply is to this message: not an earlier round's, and not sent before."""
        if facts.get("run") != self._key:
            raise RecordError("it is of another run")
        if facts.get("round") != number:
            raise RecordError(f"it is of round {str(facts.get('round'))[:20]}, and this is round {number}")
        if facts.get("nonce") != one.nonce:
            raise RecordError("it answers another message of this round, or was sent before")

    def _result(self, content: RecordDict, client: Client, federation: Federation, state: RunState) -> ClientResult:
        """Return the checked result of one client; raise RecordError if its part of the reply is not whole."""
        config, number = federation.config, state.server.round + 1
        deployed, device = config.engine.mode == "deployment", federation.shared.device
        rng = ClientRandom(config.seed, number, client.id)
        gradients: Mapping[str, torch.Tensor] = {}
        if federation.method.selects and config.adapter.selection == "gradient":
            gradients = _gradients(answer_of(content, client, device).gradients, state, client)
        job = federation.job(state, replace(client, gradients=gradients), rng)
        answer = answer_of(content, client, device, job.start.trained)
        if answer.update is None:
            raise RecordError(f"its machine could not train it: {answer.fault}")
        update = replace(with_fixed(answer.update, job.start), client=job.client)
        ends, moved = state.ends.get(client.id), answer.factor_noise if deployed and config.measure.noise else None
        if ends is not None and not deployed:
            moved = factor_noise(job.start.factors, ends)
        noise = answer.noise if config.measure.noise else None
        return federation.checked(state, job, update, noise, moved, answer.fold_seconds, answer.train_seconds)

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
        try:
            facts = facts_of(one.content)
        except RecordError:
            return ""
        return printable(str(facts["lacks"]))[:200] if "lacks" in facts else ""

    def results(self, one: RoundMessage) -> list[ClientResult]:
        return self._training.results(one, self._federation, self._state)

    def steps(self, client: Client) -> int:
        return local_steps(self._federation.config, client)

    def tell(self, message: str) -> None:
        self._training.tell(f"round {self._state.server.round + 1}: {message}")


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


def _gradients(found: Mapping[str, torch.Tensor], state: RunState, client: Client) -> Mapping[str, torch.Tensor]:
    """Return a client's gradient norms, by which it selected its modules; raise RecordError unless they can be."""
    for matrix, (A, _) in state.server.adapter.factors.items():
        own = found.get(matrix)
        if own is None or own.shape != A.shape[:1] or own.dtype != torch.float64 or not own.isfinite().all():
            raise RecordError(f"its gradients of {matrix} are not {A.shape[0]} numbers of float64")
    return {matrix: own.cpu() for matrix, own in found.items()}


def _key_of(directory: Path) -> str:
    """Return the key by which machines know a run again; it is made once."""
    path = directory / STATE
    if not path.is_file():
        make_folder(directory)
        write_sealed(path, {"run": secrets.token_hex(16)})
    return str(read_sealed(path)["run"])
