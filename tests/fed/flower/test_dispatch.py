"""Messages under way: what comes of each, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fed.flower.dispatch import Node, Post, Sent, divide
from tests.support.memory_grid import MemoryGrid


class Waiting:
    """Waits for all of some messages."""

    def __init__(self, messages: Sequence[Sent]) -> None:
        self._messages = list(messages)
        self.got: list[Sent] = []
        self._count = len(messages)

    @property
    def waits(self) -> bool:
        return len(self.got) < self._count

    def looked(self, connected: set[int]) -> list[Sent]:
        sent, self._messages = self._messages, []
        return sent

    def ended(self, one: Sent) -> None:
        self.got.append(one)


class BrokenReplies(MemoryGrid):
    """A grid on which Flower cannot unpack the replies of one node."""

    broken = 102

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        numbers = list(message_ids)
        if any(self._waiting[number].metadata.dst_node_id == self.broken for number in numbers):
            raise ValueError("Unexpected end\x1b[2J of the bytes")
        return [Message(RecordDict(), reply_to=self._waiting.pop(number)) for number in numbers]


def test_a_reply_that_flower_cannot_unpack_loses_no_other_one(tmp_path: Path) -> None:
    grid = BrokenReplies([{}, {}, {}], tmp_path)
    sent = [Sent(Node(number, {}), Message(RecordDict(), number, "train")) for number in grid.get_node_ids()]
    play = Waiting(sent)
    Post(grid).exchange(play)
    assert [one.content is not None for one in sent] == [True, False, True]
    assert [one.fault for one in sent] == [
        None,
        "its reply cannot be unpacked: Unexpected end\\x1b[2J of the bytes",
        None,
    ]


@pytest.mark.parametrize("error", [ConnectionError("gone"), MemoryError()])
def test_what_is_no_fault_of_a_reply_ends_the_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    grid = MemoryGrid([{}], tmp_path)

    def fail(numbers: Iterable[str]) -> list[Message]:
        raise error

    monkeypatch.setattr(grid, "pull_messages", fail)
    with pytest.raises(type(error)):
        Post(grid).exchange(Waiting([Sent(Node(101, {}), Message(RecordDict(), 101, "train"))]))


@pytest.mark.parametrize(
    ("steps", "speeds", "dealt"),
    [
        ([3, 3, 3, 3], [1.0], [[0, 1, 2, 3]]),
        ([3, 3, 3, 3], [1.0, 1.0], [[0, 2], [1, 3]]),
        ([3, 3, 3, 3], [3.0, 1.0], [[0, 1, 2], [3]]),
        ([2, 2, 2], [None, None, None], [[0], [1], [2]]),
        ([2, 2, 2, 2], [3.0, None], [[0, 2], [1, 3]]),
        ([9, 1, 1, 1], [1.0, 1.0], [[0], [1, 2, 3]]),
        ([5], [1.0, 2.0], [[], [0]]),
    ],
)
def test_clients_are_dealt_by_speed(steps: list[int], speeds: list[float | None], dealt: list[list[int]]) -> None:
    assert divide(steps, speeds) == dealt
