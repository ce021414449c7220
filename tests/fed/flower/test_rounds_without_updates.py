"""Rounds in which machines answer with nothing of use, or not at all: the server keeps its state, and says so."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fed.errors import StoppedError
from fed.flower.protocol import TRAIN
from tests.fed.flower.test_joining import config_of
from tests.fed.flower.test_training import deployed, play
from tests.support.memory_grid import MemoryGrid
from tests.support.reply_mutations import with_content


def test_rounds_of_unreadable_replies_end_a_run_that_is_out_of_patience(tmp_path: Path) -> None:
    told: list[str] = []
    grid = MemoryGrid(deployed(2), tmp_path)

    def tamper(number: int, reply: Message) -> list[Message]:
        return [with_content(reply, RecordDict()) if reply.metadata.message_type == TRAIN else reply]

    grid.tamper = tamper
    config = config_of("engine.mode=deployment", "rounds=9", "server.patience=2")
    with pytest.raises(StoppedError, match="no client sent a usable update in 2 rounds in a row, up to round 2"):
        play(config, tmp_path / "out", grid, told)
    grid.close()
    rows = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    assert [(row["clients"], row["skipped"], row["late"]) for row in rows[1:]] == [([0, 1], [0, 1], [])] * 2
    assert [row["faults"] for row in rows[1:]] == [["its reply cannot be used: it has no facts"] * 2] * 2
    assert rows[0]["loss"] == rows[1]["loss"] == rows[2]["loss"]
    assert sum("the server keeps its state" in line for line in told) == 2


def test_machines_that_never_answer_are_late_in_every_round(tmp_path: Path) -> None:
    told: list[str] = []
    grid = MemoryGrid(deployed(2), tmp_path)

    def tamper(number: int, reply: Message) -> list[Message]:
        if number == 102 and reply.metadata.message_type == TRAIN:
            grid.silent.add(102)
            return []
        return [reply]

    grid.tamper = tamper
    config = config_of("engine.mode=deployment", "rounds=2", "engine.deadline=2")
    rows = play(config, tmp_path / "out", grid, told)
    grid.close()
    assert [(row["clients"], row["skipped"], row["late"]) for row in rows[1:]] == [([0], [], [1])] * 2
    assert sum("client 1 gave no update: " in line for line in told) == 2


class BrokenBytes(MemoryGrid):
    """A grid on which Flower cannot unpack what node 102 answers after it has joined."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        numbers = list(message_ids)
        for number in numbers:
            message = self._waiting.get(number)
            if message and message.metadata.dst_node_id == 102 and message.metadata.message_type == TRAIN:
                raise ValueError("Unexpected end of the bytes")
        return super().pull_messages(numbers)


def test_a_reply_that_flower_cannot_unpack_is_left_out_by_name(tmp_path: Path) -> None:
    told: list[str] = []
    grid = BrokenBytes(deployed(2), tmp_path)
    rows = play(config_of("engine.mode=deployment", "rounds=2"), tmp_path / "out", grid, told)
    grid.close()
    assert [(row["clients"], row["skipped"], row["late"]) for row in rows[1:]] == [([0, 1], [1], [])] * 2
    assert [row["faults"] for row in rows[1:]] == [["its reply cannot be unpacked: Unexpected end of the bytes"]] * 2
    assert sum("client 1 is left out: its reply cannot be unpacked" in line for line in told) == 2
