"""A round over Flower that is played again and again, with replies recorded once and tampered with since."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fed.config import RunConfig
from fed.data import federated_data
from fed.experiments import run as running
from fed.flower.protocol import JOIN, versions
from fed.flower.records import FACTS
from fed.flower.training import FlowerTraining
from fed.models.head import head_names
from fed.models.shared_model import adapted
from fed.simulation.clients import drawn
from fed.simulation.inputs import input_digests
from fed.simulation.rounds import Federation
from fed.types import Round, RunState, ServerState
from tests.support.memory_grid import MemoryGrid

Tamper = Callable[[int, Message], Sequence[Message]]


def facts_in(content: RecordDict) -> dict[str, Any]:
    """Return the facts of a message or a reply."""
    found: dict[str, Any] = json.loads(str(content[FACTS]["json"]))
    return found


def with_facts(content: RecordDict, **changed: Any) -> RecordDict:
    """Return a copy of a reply in which some facts are changed."""
    other = copied(content)
    other[FACTS] = ConfigRecord({"json": json.dumps(facts_in(content) | changed)})
    return other


def copied(content: RecordDict) -> RecordDict:
    """Return a copy of a reply that can be changed; arrays are shared, and none of them is changed in place."""
    return RecordDict(
        {
            name: ArrayRecord(dict(record))
            if isinstance(record, ArrayRecord)
            else type(record)(copy.deepcopy(dict(record)))
            for name, record in content.items()
        }
    )


@dataclass
class Played:
    """A round that was played: what was told meanwhile, and each message's clients, nonce and replies' contents."""

    round: Round
    told: list[str]
    replies: list[tuple[list[int], str, list[RecordDict]]] = field(default_factory=list)

    @property
    def used(self) -> list[int]:
        """The clients whose updates were used."""
        return [client for client in self.round.row["clients"] if client not in self.round.row["skipped"]]

    def content_of(self, client: int) -> RecordDict:
        """Return the reply that a client's update must be from: the first of those that answer the message to it."""
        for clients, nonce, contents in self.replies:
            for content in contents if client in clients else ():
                try:
                    facts, own = facts_in(content), spread_out(content)
                    if isinstance(facts, dict) and facts.get("nonce") == nonce and f"arrays-{client}" in own:
                        return own
                except (KeyError, ValueError, TypeError, RecursionError):
                    continue
        raise AssertionError(f"client {client} was used, and no reply holds its update")


class RecordedRound:
    """The second round of a run; every machine answers for every client as it was recorded, at once."""

    def __init__(self, federation: Federation, grid: MemoryGrid, told: list[str]) -> None:
        self.federation, self.grid, self.told = federation, grid, told
        self._joins: dict[int, RecordDict] = {}
        self.records: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        grid.tamper = self._record
        self.before: RunState = federation.round(federation.beginning()).state
        self.earlier = copied(RecordDict({FACTS: ConfigRecord({"json": json.dumps(self._facts)}), **self.records}))
        self.records.clear()
        federation.round(self.before)
        self.drawn = [client.id for client in drawn(federation.config, self.before.clients, 2)]
        for number, node in grid.nodes.items():
            assert node.machine is not None
            client = None
            if federation.config.engine.mode == "deployment":
                client = federation.executor.nodes[number].facts["client"]  # type: ignore[union-attr]
            facts = {"run": self._facts["run"], "versions": versions(), "client": client}
            self._joins[number] = RecordDict({FACTS: ConfigRecord({"json": json.dumps(facts)})})
            node.answer = self._answerer(number)  # type: ignore[method-assign]

    def grid_numbers(self) -> list[int]:
        """Return the numbers of the machines that are sent clients in this round."""
        numbers: list[int] = []

        def note(number: int, reply: Message) -> list[Message]:
            numbers.append(number)
            return [reply]

        self.play(note)
        return numbers

    def _record(self, number: int, reply: Message) -> list[Message]:
        if reply.metadata.message_type == JOIN:
            return [reply]
        self._facts = facts_in(reply.content)
        self.records |= {name: record for name, record in spread_out(reply.content).items() if name != FACTS}
        return [reply]

    def _answerer(self, number: int) -> Callable[[Message], Message]:
        def answer(message: Message) -> Message:
            if message.metadata.message_type == JOIN:
                return Message(copied(self._joins[number]), reply_to=message)
            return Message(self.content_for(message), reply_to=message)

        return answer

    def content_for(self, message: Message) -> RecordDict:
        """Return the recorded reply to a message."""
        asked = facts_in(message.content)
        clients = [client["id"] for client in asked["clients"]]
        facts = self._facts | {name: asked[name] for name in ("run", "round", "nonce")} | {"clients": clients}
        own = {name: record for name, record in self.records.items() if int(name.rpartition("-")[2]) in clients}
        return copied(RecordDict({FACTS: ConfigRecord({"json": json.dumps(facts)}), **own}))

    def play(self, tamper: Tamper | None = None) -> Played:
        """Play the round, with replies tampered with, as if no other had been played since it was recorded."""
        training = self.federation.executor
        assert isinstance(training, FlowerTraining)
        for node in training.nodes.values():
            node.speed = None
        self.told.clear()
        replies: list[tuple[list[int], str, list[RecordDict]]] = []

        def tampered(number: int, reply: Message) -> Sequence[Message]:
            if reply.metadata.message_type == JOIN:
                return [reply]
            facts = facts_in(reply.content)
            given = [reply] if tamper is None else tamper(number, reply)
            replies.append((facts["clients"], facts["nonce"], [own.content for own in given if own.has_content()]))
            return given

        self.grid.tamper = tampered
        return Played(self.federation.round(self.before), list(self.told), replies)


@contextmanager
def recorded_round(config: RunConfig, nodes: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[RecordedRound]:
    """Record the second round of a run over machines in this process."""
    told: list[str] = []
    grid = MemoryGrid(nodes, folder)
    with ExitStack() as stack:
        stack.callback(grid.close)
        stack.enter_context(running.limits(config.threads))
        data = federated_data.load(config)
        model = running.make_base(config, data, folder / "out" / "base")
        inputs = input_digests(data, model)  # before the model is adapted
        shared = stack.enter_context(adapted(config, model, head_names(model)))
        training = FlowerTraining(grid, lambda: folder / "out", told.append)
        yield RecordedRound(Federation(config, data, shared, told.append, executor=training, inputs=inputs), grid, told)


def mean_of(server: ServerState, contents: Mapping[int, RecordDict]) -> dict[str, np.ndarray]:
    """Return Fed-PLoRA's next factors and head, fp64 and by name, from the clients' updates in their replies.

    a_j = Σ_{i∈Q_j} p_i a_ij / Σ_{i∈Q_j} p_i, and b_j likewise; a module that nobody trained stays.
    """
    means: dict[str, np.ndarray] = {}
    weights = {client: float(content[f"metrics-{client}"]["weight"]) for client, content in contents.items()}
    for matrix, (A, B) in server.adapter.factors.items():
        for side, before in (("A", A.numpy()), ("B", B.numpy().T)):
            sums, total = np.zeros(before.shape), np.zeros(len(before))
            for client, content in contents.items():
                own = read_array(content[f"arrays-{client}"][f"{side}/{matrix}"])
                for place, module in enumerate(content[f"modules-{client}"][f"of {matrix}"]):
                    sums[module] += weights[client] * (own[place] if side == "A" else own[:, place])
                    total[module] += weights[client]
            trained = total > 0
            mean = before.copy()
            mean[trained] = sums[trained] / total[trained, None]
            means[f"{side}/{matrix}"] = mean if side == "A" else mean.T
    for name, value in server.head.items():
        parts = [
            weights[own] * read_array(content[f"arrays-{own}"][f"head/{name}"]) for own, content in contents.items()
        ]
        means[f"head/{name}"] = sum(parts) / sum(weights.values()) if parts else value.numpy()
    return means


def spread_out(content: RecordDict) -> RecordDict:
    """Return a reply with every tensor an array by itself, read with NumPy alone; one without a bundle as it is."""
    if "layout" not in content:
        return content
    layout = json.loads(str(content["layout"]["json"]))
    flat = {dtype: read_array(array) for dtype, array in content["bundle"].items()}
    found = RecordDict({name: record for name, record in content.items() if name not in ("bundle", "layout")})
    for title, tensors in layout.items():
        found[title] = ArrayRecord()
        for name, (dtype, shape) in tensors.items():
            size = int(np.prod(shape, dtype=int))
            found[title][name] = Array(flat[dtype][:size].reshape(shape))
            flat[dtype] = flat[dtype][size:]
    return found


def read_array(array: Array) -> np.ndarray:
    """Return an array of a message as NumPy reads it."""
    return np.load(io.BytesIO(array.data), allow_pickle=False)


def named(server: ServerState) -> dict[str, np.ndarray]:
    """Return a server's factors and head by name."""
    found = {f"head/{name}": value.numpy() for name, value in server.head.items()}
    for matrix, (A, B) in server.adapter.factors.items():
        found |= {f"A/{matrix}": A.numpy(), f"B/{matrix}": B.numpy()}
    return found
