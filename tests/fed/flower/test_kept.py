"""What clients keep on their machines, when the server only tries a state, or refuses what they sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fed.flower.protocol import TRAIN
from fed.flower.records import facts_of
from fed.simulation import rounds
from fed.simulation.update_checks import Asked, find_fault
from fed.types import ClientStart, ClientUpdate, ServerState
from tests.fed.flower.test_training import METHODS, OWN, assert_same_run, config_of, deployed, play
from tests.support.memory_grid import MemoryGrid


class Noted(MemoryGrid):
    """A grid that notes the facts of what is sent to train."""

    def __init__(self, configs: Sequence[Mapping[str, Any]], folder: Path) -> None:
        super().__init__(configs, folder)
        self.facts: list[dict[str, Any]] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == TRAIN:
                self.facts.append(facts_of(message.content))
        return super().push_messages(messages)


@pytest.mark.parametrize(
    ("mode", "method"), [("deployment", "fedsa-lora"), pytest.param("simulation", "flora", marks=pytest.mark.slow)]
)
def test_a_state_that_is_only_tried_leaves_no_trace_on_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, method: str
) -> None:
    monkeypatch.setattr(rounds, "LARGE_LOSS", -1.0)  # so that a client tries every new state
    settings = [*METHODS[method], f"method={method}", "checkpoint_every=1"]
    grid = Noted(deployed() if mode == "deployment" else [{}, {}], tmp_path)
    play(config_of(*settings, f"engine.mode={mode}"), tmp_path / "there", grid)
    grid.close()
    play(config_of(*settings), tmp_path / "here")
    assert [facts["round"] for facts in grid.facts if facts["trial"]] == [1, 2, 3]
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN if mode == "deployment" else None)


def test_a_client_whose_update_was_refused_goes_on_from_what_it_kept_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(server: ServerState, start: ClientStart, update: ClientUpdate, asked: Asked) -> str | None:
        if server.round == 1 and update.client.id == 1:
            return "refused"
        return find_fault(server, start, update, asked)

    monkeypatch.setattr(rounds, "find_fault", refuse)
    settings = [*METHODS["fedsa-lora"], "method=fedsa-lora", "clients.per_round=4"]
    grid = Noted(deployed(), tmp_path)
    rows = play(config_of(*settings, "engine.mode=deployment"), tmp_path / "there", grid)
    grid.close()
    play(config_of(*settings), tmp_path / "here")
    assert [row["skipped"] for row in rows] == [[], [], [1], []]
    kept = {(facts["round"], own["id"]): own["kept_round"] for facts in grid.facts for own in facts["clients"]}
    assert [kept[3, client] for client in range(4)] == [2, 1, 2, 2]
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN)
