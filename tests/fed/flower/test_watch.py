"""Messages that a machine has lost while it counts as connected: it is asked, and what it lost is sent again."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from fed.flower import client_app, watch
from fed.flower.protocol import ASK, MESSAGE, WORKING
from fed.flower.watch import Watch, is_working
from tests.fed.flower.test_lost_machines import FEDSA, is_of_round, with_states
from tests.fed.flower.test_run import TINY
from tests.fed.flower.test_training import OWN, assert_same_run, config_of, play
from tests.support.flower_control import until
from tests.support.flower_keys import make_key
from tests.support.flower_network import FlowerNetwork
from tests.support.memory_grid import MemoryGrid
from tests.support.processes import Process
from tests.support.tiers import slow


class Machines:
    """Machines that answer questions as told: True and False are answers, "error" is one, None is no answer."""

    def __init__(self, grid: MemoryGrid) -> None:
        self._grid = grid  # for the identities of messages
        self.says: list[bool | str | None] = []
        self.asked: list[tuple[int, str]] = []

    def push(self, message: Message) -> str:
        self.asked.append((message.metadata.dst_node_id, str(message.content[ASK][MESSAGE])))
        (number,) = self._grid.push_messages([message])
        return number

    def pull(self, numbers: Sequence[str]) -> list[Message]:
        replies = []
        for number in numbers:
            said = self.says.pop(0) if self.says else None
            question = self._grid._waiting[number]
            if said == "error":
                replies.append(Message(Error(code=1, reason="expired"), reply_to=question))
            elif said == "nothing":
                replies.append(Message(RecordDict({ASK: ConfigRecord({WORKING: "yes"})}), reply_to=question))
            elif said is not None:
                replies.append(is_working(question, lambda number, said=said: bool(said)))
        return replies


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(MemoryGrid([{}], tmp_path))


def lost(machines: Machines, says: Sequence[bool | str | None], seconds: float) -> list[tuple[float, list[str]]]:
    """Look once a second at a message under way, and return when it is found lost."""
    machines.says = list(says)
    own = Watch(machines.push, machines.pull)
    found = [(float(now), own.lost({"m": 101}, float(now))) for now in range(int(seconds))]
    return [one for one in found if one[1]]


def test_a_message_is_lost_once_its_machine_said_so_twice_in_a_row(machines: Machines) -> None:
    # Asked after 60 s, answered a second later; asked again 60 s after the first question.
    assert lost(machines, [False, False], 122) == [(121.0, ["m"])]
    assert machines.asked == [(101, "m"), (101, "m")]
    assert lost(machines, [False, True, False], 250) == []
    assert lost(machines, [False, "error", False], 182) == [(181.0, ["m"])]  # an error says nothing either way
    assert lost(machines, [False, "nothing", False], 182) == [(181.0, ["m"])]


def test_a_question_without_an_answer_is_asked_anew(machines: Machines) -> None:
    lost(machines, [None] * 1000, 60 + 121)
    assert len(machines.asked) == 2


def test_what_takes_hours_is_asked_about_ever_less(machines: Machines) -> None:
    lost(machines, [True] * 1000, 4 * 3600)
    assert len(machines.asked) < 60


def test_an_answered_message_is_watched_no_more(machines: Machines) -> None:
    own = Watch(machines.push, machines.pull)
    machines.says = [False, False]
    own.lost({"m": 101}, 0.0)
    own.lost({"m": 101}, 60.0)
    assert own.lost({}, 61.0) == []
    assert own.lost({"m": 101}, 62.0) == []
    assert machines.asked == [(101, "m")]


def test_a_client_app_says_what_it_works_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app, "_folder", lambda context: tmp_path)
    context, grid = Context(1, 1, {}, RecordDict(), {}), MemoryGrid([{}], tmp_path)  # type: ignore[arg-type]
    work, question = Message(RecordDict(), 101, "train"), Message(RecordDict(), 101, ASK)
    grid.push_messages([work, question])
    said = []

    def ask(number: object) -> None:
        question.content[ASK] = ConfigRecord({MESSAGE: number})  # type: ignore[dict-item]
        said.append(client_app.working(question, context).content[ASK][WORKING])

    def train(kind: str, message: Message, context: Context) -> Message:
        for number in (work.metadata.message_id, "another", "../x", 3):
            ask(number)
        raise RuntimeError("the trainer failed")

    monkeypatch.setattr(client_app, "_handed_over", train)
    with pytest.raises(RuntimeError, match="the trainer failed"):
        client_app.train(work, context)
    ask(work.metadata.message_id)
    assert said == [True, False, False, False, False]
    assert list(tmp_path.glob("works-on-*")) == []


@pytest.mark.parametrize("lost", ["training", *slow("joining")])
def test_what_a_restarted_machine_has_lost_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(watch, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.0)
    told: list[str] = []
    dropped: list[int] = []

    def drop_once(number: int, reply: Message) -> Iterable[Message]:
        of_it = is_of_round(reply, 2) if lost == "training" else reply.metadata.group_id == "join"
        if number == 102 and of_it and not dropped:
            dropped.append(number)
            grid.nodes[number].forget()
            return []
        return [reply]

    grid = MemoryGrid(with_states(tmp_path), tmp_path, drop_once)
    play(config_of(*FEDSA, "engine.mode=deployment"), tmp_path / "there", grid, told)
    grid.close()
    assert dropped == [102]
    if lost == "training":
        assert "round 2: its machine has lost the message; sent again once its SuperNode is back: client 1" in told
    else:
        assert "SuperNode 102 does not take part: its machine has lost the message" in told
    play(config_of(*FEDSA), tmp_path / "here")
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN)


@pytest.mark.slow
def test_a_node_with_a_key_that_is_back_unseen_gets_its_client_again(tmp_path: Path) -> None:
    """Three minutes of waiting: for Flower to let the key in again, and for the two answers of the node."""
    settings = [*TINY, "clients.count=1", "clients.per_round=1", "rounds=1", "clients.ranks=[4]"]
    settings += ["train.local_steps=2500"]
    users = Path(tempfile.gettempdir()) / f"plora-fed-{os.getuid()}"
    with FlowerNetwork(tmp_path / "network", authentication=True, idle_seconds=0.2) as network:
        assert network.certificates is not None
        key = make_key(tmp_path, "key")
        network.register(key)
        node = network.add_node({"partition-id": 0, "state": str(tmp_path / "state")}, key=key)
        network.wait_online([node])
        over = [f"engine.root_certificates={network.certificates.authority}", "engine.mode=deployment"]
        over += ["--flower", network.address, "--no-centralised", "--out", str(tmp_path / "there")]
        with Process(tmp_path / "over", "run", "digits", *settings, *over) as there:
            rows = tmp_path / "there" / "rounds.jsonl"
            assert there.until(rows.exists, 240), network.tails()
            assert until(lambda: any(users.glob("*/works-on-*")), 60)
            network.kill(node.running)
            time.sleep(20)
            # So that the server does not see that the node is missing when the minute is over.
            servers = [pid for pid, command in network.running_processes().items() if "flwr-serverapp" in str(command)]
            for pid in servers:
                os.kill(pid, signal.SIGSTOP)
            try:
                while node.running.status is not None:
                    network.start_node(node)
                    until(lambda: node.running.status is not None or network.node_id(node) is not None, 30)
            finally:
                for pid in servers:
                    os.kill(pid, signal.SIGCONT)
            outcome = there.wait(600)
        assert outcome.status == 0, f"{outcome}\n{network.tails()}"
    assert "its machine has lost the message; sent again once its SuperNode is back: client 0" in outcome.out, (
        outcome.out
    )
    play(config_of(*settings), tmp_path / "here")
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN)
