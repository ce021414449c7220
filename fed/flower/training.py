"""The training of a run's clients on the machines that Flower connects (`fed.simulation.rounds.Executor`)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fed import interruption
from fed.errors import FedError, printable
from fed.files import make_folder
from fed.flower.dispatch import Node, Sent, divide, exchange
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
from fed.sealed import read_sealed, write_sealed
from fed.seeding import ClientRandom
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
                if lacks := self._lacks(one, federation):
                    return self._joined_again(one, lacks, federation, state)
                answered = self._results(one, federation, state)
                found.update({result.client.id: result for result in answered})
                missing = [client for client in one.clients if client.id not in found]
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
                why = self._why_not(node, federation)
            except RecordError as error:
                why = str(error)
        if why is None:
            self._nodes[node.number] = node
            if (other := node.facts["versions"].get("torch")) != versions()["torch"]:
                self._tell(f"SuperNode {node.number} has torch {printable(str(other))[:40]}: it may round otherwise")
            return
        if not one.lost:
            self._refused.add(node.number)
        self._tell(f"SuperNode {node.number} does not take part: {printable(why)[:800]}")

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
        if others := [own for own in self._nodes.values() if own.client == number]:
            return f"its partition-id is {number}, as that of SuperNode {others[0].number}; each has one of its own"
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
        return _Round(node, message, clients=list(clients), nonce=nonce)

    def _lacks(self, one: _Round, federation: Federation) -> str:
        """Return what a machine said that it lacks to train, or ""."""
        assert one.content is not None
        try:
            facts = facts_of(one.content)
        except RecordError:
            return ""
        return str(facts["lacks"])[:200] if "lacks" in facts else ""

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
                self._tell(f"round {number}: client {client.id} is left out: {error}")
        return found

    def _check_reply(self, facts: Mapping[str, Any], one: _Round, number: int) -> None:
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

    def _tell_lost(self, state: RunState, clients: Iterable[Client], why: str | None) -> None:
        for client in clients:
            self._tell(
                f"round {state.server.round + 1}: client {client.id} gave no update: {why or 'it did not answer'}"
            )


class _Round(Sent):
    """A message of a round, with the clients that it has trained and the number that its reply must repeat."""

    def __init__(self, node: Node, message: Message, clients: list[Client], nonce: str) -> None:
        super().__init__(node, message)
        self.clients, self.nonce, self.again = clients, nonce, False


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
