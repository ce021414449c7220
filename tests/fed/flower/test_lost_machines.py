"""Machines that are lost in a round, or while a run is stopped; they are in this process, so no time passes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from flwr.app import Error, Message

from fed.errors import FedError
from fed.experiments import run as running
from fed.flower import round_in_play
from fed.flower.kept import KeptStates
from fed.flower.protocol import TRAIN
from fed.flower.trainer import Trainer
from fed.flower.training import FlowerTraining
from fed.simulation.client_store import ClientState
from tests.fed.flower.test_training import EQUAL, OWN, SMALL, assert_same_run, config_of, play
from tests.support.memory_grid import MemoryGrid

FEDSA = [*EQUAL, "method=fedsa-lora", "clients.per_round=4"]


def with_states(folder: Path, count: int = 4) -> list[dict[str, Any]]:
    """Return the configs of nodes whose clients' own values outlive them."""
    return [{"partition-id": number, "state": str(folder / f"state-{number}")} for number in range(count)]


def is_of_round(reply: Message, number: int) -> bool:
    return reply.metadata.message_type == TRAIN and reply.metadata.group_id == str(number)


@pytest.mark.slow
def test_a_client_whose_machine_comes_back_under_another_number_trains_in_the_same_round(tmp_path: Path) -> None:
    told: list[str] = []

    def die_once(number: int, reply: Message) -> Iterable[Message]:
        if number != 102 or not is_of_round(reply, 2):
            return [reply]
        grid.add(grid.nodes.pop(number).config)
        return []

    grid = MemoryGrid(with_states(tmp_path), tmp_path, die_once)
    play(config_of(*FEDSA, "engine.mode=deployment"), tmp_path / "there", grid, told)
    grid.close()
    assert 105 in grid.nodes
    assert any("no longer connected; sent again once its SuperNode is back: client 1" in line for line in told)
    play(config_of(*FEDSA), tmp_path / "here")
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN)


@pytest.mark.slow
def test_a_second_supernode_takes_over_when_the_first_is_gone(tmp_path: Path) -> None:
    told: list[str] = []

    def die_once(number: int, reply: Message) -> Iterable[Message]:
        if number == 104 and is_of_round(reply, 2):
            del grid.nodes[104]
            return []
        return [reply]

    configs = with_states(tmp_path)
    grid = MemoryGrid([*configs, configs[3]], tmp_path, die_once)
    play(config_of(*FEDSA, "engine.mode=deployment"), tmp_path / "there", grid, told)
    grid.close()
    assert any(
        "SuperNode 105 does not take part: its partition-id is 3, as that of SuperNode 104" in one for one in told
    )
    play(config_of(*FEDSA), tmp_path / "here")
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN)


@pytest.mark.slow
def test_a_machine_that_stays_away_is_waited_for_once(tmp_path: Path) -> None:
    told: list[str] = []

    def die(number: int, reply: Message) -> Iterable[Message]:
        if number == 103 and is_of_round(reply, 1):
            del grid.nodes[number]
            return []
        return [reply]

    grid = MemoryGrid(with_states(tmp_path), tmp_path, die)
    settings = [*SMALL, "clients.per_round=4", "engine.mode=deployment", "engine.wait=3"]
    rows = play(config_of(*settings), tmp_path / "there", grid, told)
    grid.close()
    assert [row["clients"] for row in rows] == [[], *[[0, 1, 3]] * 3]
    assert [row.get("late", []) for row in rows] == [[], *[[2]] * 3]
    assert sum("waiting up to 3 s for the SuperNode of client 2" in line for line in told) == 1
    assert sum("client 2 gave no update: its SuperNode is not connected" in line for line in told) == 3


@pytest.mark.parametrize(("mode", "resends"), [("simulation", None), ("deployment", None), ("simulation", 0)])
def test_a_client_that_ends_every_machine_is_given_up(tmp_path: Path, mode: str, resends: int | None) -> None:
    told: list[str] = []
    failures = 0

    def fail(number: int, reply: Message) -> Iterable[Message]:
        nonlocal failures
        if not is_of_round(reply, 1) or (mode == "deployment" and number != 102):
            return [reply]
        failures += 1
        error = Message(Error(code=2, reason="the trainer failed"), reply_to=reply)
        error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
        return [error]

    grid = MemoryGrid(with_states(tmp_path) if mode == "deployment" else [{}], tmp_path, fail)
    settings = [*SMALL, "rounds=1", "clients.per_round=4", f"engine.mode={mode}"]
    settings += [] if resends is None else [f"engine.resends={resends}"]
    rows = play(config_of(*settings), tmp_path / "there", grid, told)
    grid.close()
    assert failures == 1 + (1 if resends is None else resends)
    assert rows[1]["late"] == ([1] if mode == "deployment" else [0, 1, 2, 3])


@pytest.mark.slow
def test_a_deployment_goes_on_without_a_machine_that_is_gone(tmp_path: Path) -> None:
    out, settings = tmp_path / "there", [*SMALL, "clients.per_round=4", "engine.mode=deployment", "engine.wait=3"]
    grid = MemoryGrid(with_states(tmp_path), tmp_path)
    play(config_of(*settings, "rounds=1"), out, grid)
    grid.close()
    del grid.nodes[101]
    rows = resumed(config_of(*settings, "rounds=2"), out, grid)
    grid.close()
    assert [row["clients"] for row in rows] == [[], [0, 1, 2, 3], [1, 2, 3]]
    grid.nodes.clear()
    with pytest.raises(FedError, match=r"engine.nodes is 1, and 0 SuperNodes have joined after engine.wait = 3 s"):
        resumed(config_of(*settings, "rounds=3"), out, grid)


def resumed(config: Any, out: Path, grid: MemoryGrid) -> Any:
    """Go on with a run and return all rows."""
    from fed.data import federated_data

    executor = FlowerTraining(grid, lambda: out, lambda line: None)
    with running.limits(config.threads):
        data = federated_data.load(config)
        model = running.reopen_base(out, config, data.label_names)
        return running.play(
            config, data, model, out, lambda row: None, lambda line: None, resume=True, executor=executor
        )


@pytest.mark.parametrize("status", [500, 404])
def test_a_superlink_that_is_overloaded_is_asked_again(tmp_path: Path, status: int) -> None:
    class Overloaded(MemoryGrid):
        failures = 1

        def get_node_ids(self) -> list[int]:
            self.failures -= 1
            if self.failures == 0:
                request = httpx.Request("POST", "http://127.0.0.1")
                raise httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))
            return super().get_node_ids()

    grid = Overloaded([{}], tmp_path)
    training = FlowerTraining(grid, lambda: tmp_path, lambda line: None)
    federation: Any = SimpleNamespace(config=config_of(*SMALL, "engine.wait=0"))
    expected = FedError if status == 500 else httpx.HTTPStatusError
    grid.nodes.clear()
    with pytest.raises(expected):
        training.clients(federation)


@pytest.mark.parametrize(
    ("writes", "left"),
    [
        ([(1, 0, 0), (2, 1, 0), (3, 2, 1), (4, 3, 2)], [2, 3, 4]),
        ([(1, 0, 0), (2, 1, 0), (3, 2, 0), (4, 3, 0)], [1, 2, 3, 4]),
        ([(2, 0, 0), (5, 2, 3), (9, 5, 7)], [5, 9]),
        # The server refused what came of rounds 2 and 3.
        ([(1, 0, 0), (2, 1, 0), (3, 1, 1), (4, 1, 2)], [1, 2, 3, 4]),
    ],
)
def test_what_a_client_kept_stays_for_as_long_as_a_server_may_go_back_to_it(
    tmp_path: Path, writes: list[tuple[int, int, int]], left: list[int]
) -> None:
    kept = KeptStates(tmp_path, torch.device("cpu"))
    for number, before, since in writes:
        kept.write(3, number, before, since, ClientState({"m": torch.full((2,), float(number))}, {}, {}))
    assert [number for number in range(1, 10) if kept.read(3, number, None) is not None] == left
    for number in left:
        found = kept.read(3, number, None)
        assert found is not None
        assert found.memory["m"].tolist() == [number, number]


def test_a_trainer_removes_what_one_before_it_left(tmp_path: Path) -> None:
    (tmp_path / "run-1" / "base").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    Trainer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_machine_that_takes_far_longer_than_before_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    waits = 0

    class Slow(MemoryGrid):
        """A grid on which the answer to node 102's second message of training is there at the eighth look."""

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            nonlocal waits
            slow = [number for number in message_ids if self._is_slow(number)]
            waits += bool(slow)
            return super().pull_messages([number for number in message_ids if number not in slow or waits >= 8])

        def _is_slow(self, number: str) -> bool:
            message = self._waiting.get(number)
            return message is not None and message.metadata.dst_node_id == 102 and is_of_round(message, 2)

    monkeypatch.setattr(round_in_play, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(round_in_play, "SLOW_FACTOR", 0.0)
    grid = Slow(with_states(tmp_path), tmp_path)
    settings = [*SMALL, "rounds=2", "clients.per_round=4", "engine.mode=deployment", "engine.deadline=600"]
    rows = play(config_of(*settings), tmp_path / "there", grid, told)
    grid.close()
    assert [row["late"] for row in rows[1:]] == [[], []]
    assert [line for line in told if "slow" in line] == [
        "round 2: SuperNode 102 is slow; waiting until it answers or is gone: client 1"
    ]
