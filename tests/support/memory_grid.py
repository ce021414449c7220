"""Flower's grid without Flower's processes: SuperNodes in this process, and faults that a test puts between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fed.flower import client_app, machine
from fed.flower.protocol import ASK, JOIN
from fed.flower.records import FACTS, facts_record
from fed.flower.watch import is_working

# Gets a node's number and its reply, and returns the replies to give the server in its place.
Tamper = Callable[[int, Message], Iterable[Message]]


class MemoryNode:
    """A SuperNode: its config, its context, and the machine that a trainer's process would hold."""

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self.config, self.folder = dict(config), folder
        self.context = Context(1, 1, self.config, RecordDict(), {})  # type: ignore[arg-type]
        self.machine: machine.Machine | None = None
        self.calls = 0
        self.said: list[str] = []

    def answer(self, message: Message) -> Message:
        """Answer a message as `fed.flower.client_app` and `fed.flower.trainer` do together."""
        if message.metadata.message_type == ASK:
            return is_working(message, lambda number: False)
        self.calls += 1
        if message.metadata.message_type == JOIN:
            self.forget()
            place = self.folder / f"run-{self.calls}"
            self.machine, content = machine.join(message.content, self.config, place, self.said.append)
            return Message(content, reply_to=message)
        client_app.with_kept(message.content, self.context)
        if self.machine is None:
            content = RecordDict({FACTS: facts_record({"lacks": "the run"})})
        else:
            content = machine.train(self.machine, message.content)
        reply = Message(content, reply_to=message)
        client_app.keep(reply.content, self.context)
        return reply

    def forget(self) -> None:
        """Lose the run, as a trainer does that was killed."""
        if self.machine is not None:
            self.machine.close()
        self.machine = None


class MemoryGrid(Grid):
    """A grid of `MemoryNode`s, by number; messages are answered when their replies are asked for.

    A node in `silent` never answers, and one that leaves `nodes` is gone.
    """

    def __init__(self, configs: Sequence[Mapping[str, Any]], folder: Path, tamper: Tamper | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.folder, self.tamper = folder, tamper
        self.nodes: dict[int, MemoryNode] = {}
        self.silent: set[int] = set()
        self._numbers = itertools.count(101)
        self._identities = itertools.count()
        self._waiting: dict[str, Message] = {}
        for config in configs:
            self.add(config)

    def add(self, config: Mapping[str, Any]) -> int:
        """Connect another node, and return its number."""
        number = next(self._numbers)
        self.nodes[number] = MemoryNode(config, self.folder / f"node-{number}")
        return number

    def close(self) -> None:
        """Restore what the nodes hold."""
        for node in self.nodes.values():
            node.forget()

    def get_node_ids(self) -> list[int]:
        """Return the numbers of the connected nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages, and return what their replies refer to."""
        taken = []
        for message in messages:
            identity = f"message-{next(self._identities)}"
            message.metadata.__dict__["_message_id"] = identity
            self._waiting[identity] = message
            taken.append(identity)
        return taken

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Have messages answered and return the replies."""
        replies: list[Message] = []
        for identity in message_ids:
            message = self._waiting.get(identity)
            if message is None:
                continue
            number = message.metadata.dst_node_id
            if number in self.silent:
                continue
            del self._waiting[identity]
            if number not in self.nodes:
                replies.append(Message(Error(code=5, reason="Node Unavailable"), reply_to=message))
                continue
            reply = self.nodes[number].answer(message)
            replies += [reply] if self.tamper is None else self.tamper(number, reply)
        return replies

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the replies to them."""
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError
