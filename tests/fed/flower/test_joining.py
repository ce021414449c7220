"""Machines that cannot take part in a run: each is refused by name and with the reason, and the run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fed import config as configuration
from fed.data import federated_data
from fed.experiments import run as running
from fed.flower import machine
from fed.flower.joining import invitation
from fed.flower.protocol import JOIN, versions
from fed.flower.records import FACTS, arrays_of
from fed.simulation.inputs import BASE, LABELS, ROWS, input_digests
from fed.simulation.rounds import Federation
from tests.fed.flower.test_training import deployed, play
from tests.support.memory_grid import MemoryGrid
from tests.support.recorded_grid import facts_in, with_facts
from tests.support.reply_mutations import with_content, with_error

SETTINGS = [
    *("rounds=1", "clients.count=2", "clients.per_round=2", "clients.ranks=[2]", "adapter.rank=2", "threads=1"),
    *("model.pretrain_steps=1", "data.train_rows=40", "data.test_rows=20", "train.local_steps=1", "engine.wait=1"),
]
HOSTILE = "\x1b[2J\u202e"


def config_of(*settings: str) -> Any:
    return configuration.load("digits", [*SETTINGS, *settings])


def refusals(told: Sequence[str]) -> list[str]:
    """Return what was said of machines that do not take part."""
    return [line for line in told if "does not take part" in line]


def test_all_take_part_that_can(tmp_path: Path) -> None:
    told: list[str] = []
    grid = MemoryGrid(deployed(2), tmp_path)
    (_, row) = play(config_of("engine.mode=deployment"), tmp_path / "out", grid, told)
    grid.close()
    assert refusals(told) == []
    assert (row["clients"], row["skipped"], row["late"]) == ([0, 1], [], [])


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"partition-id": 0, "rank": 3}, "its node config has rank = 3; an integer from 1 to 2 would be right"),
    ({"partition-id": 0, "rank": 0}, "its node config has rank = 0"),
    ({"partition-id": 0, "rank": "2"}, "its node config has rank = '2'"),
    ({"partition-id": 0, "rank": True}, "its node config has rank = True"),
    ({"partition-id": 0, "memory-mib": 0.001}, "holds 0.001: training one module a matrix takes about"),
    ({"partition-id": 0, "memory-mib": "much"}, "its node config has memory-mib = 'much'; a number of MiB"),
    ({"partition-id": 2}, "its node config has partition-id = 2; .* an integer from 0 to 1 would be right"),
    ({"partition-id": -1}, "its node config has partition-id = -1"),
    ({"partition-id": "0"}, "its node config has partition-id = '0'"),
    ({}, "its node config has partition-id = None"),
    ({"partition-id": 1}, "its partition-id is 1, as that of SuperNode 102; each has one of its own"),
    ({"partition-id": 0, "rows": "rows.csv"}, "its node config has rows, and the run's data are images"),
    ({"partition-id": 0, "device": "tpu"}, "device"),
    ({"partition-id": 0, "threads": -1}, "threads"),
]


def test_node_configs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    told: list[str] = []
    grid = MemoryGrid([*deployed(2), *(node for node, _ in CONFIGS)], tmp_path)
    (_, row) = play(config_of("engine.mode=deployment"), tmp_path / "out", grid, told)
    grid.close()
    lines = refusals(told)
    for line, number, (_, why) in zip(lines, range(103, 200), CONFIGS, strict=False):
        assert re.search(rf"^SuperNode {number} does not take part: .*{why}", line), line
    assert len(lines) == len(CONFIGS)
    assert (row["clients"], row["skipped"], row["late"]) == ([0, 1], [], [])


def test_what_a_run_does_not_read_of_a_node_config_is_named(tmp_path: Path) -> None:
    told: list[str] = []
    grid = MemoryGrid([{"partition-id": 0, HOSTILE: 1, "colour": "red"}, {"partition-id": 1}], tmp_path)
    play(config_of("engine.mode=deployment"), tmp_path / "out", grid, told)
    grid.close()
    (line,) = [line for line in told if "does not read" in line]
    assert line == r"SuperNode 101: a run does not read \x1b[2J\u202e, colour of its node config"


def _other_digest(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(patches: pytest.MonkeyPatch) -> None:
        patches.setattr(machine, "input_digests", lambda *own: input_digests(*own) | {name: "0" * 64})

    return patch


def _other_version(**changed: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(patches: pytest.MonkeyPatch) -> None:
        patches.setattr(machine, "versions", lambda: versions() | changed)

    return patch


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        (_other_version(**{"plora-kernels": "0.0.1"}), "it has plora-kernels 0.0.1, and the server "),
        (_other_version(protocol=0), "it has protocol 0, and the server 1"),
        (_other_digest(BASE), "the base model on this machine differs from what the run's server has"),
        (_other_digest(ROWS), "the rows of the data on this machine differs from what the run's server has"),
        (_other_digest(LABELS), "the labels of the data on this machine differs from what the run's server has"),
    ],
    ids=["version", "protocol", "base", "rows", "labels"],
)
@pytest.mark.parametrize("mode", ["simulation", "deployment"])
def test_another_version_or_other_data_are_refused(
    tmp_path: Path, patch: Callable[[pytest.MonkeyPatch], None], why: str, mode: str
) -> None:
    told: list[str] = []
    grid = MemoryGrid([*(deployed(2) if mode == "deployment" else [{}]), {"partition-id": 0}], tmp_path)
    other = max(grid.nodes)
    answer = grid.nodes[other].answer

    def answer_as_another(message: Message) -> Message:
        with pytest.MonkeyPatch.context() as patches:
            patch(patches)
            return answer(message)

    grid.nodes[other].answer = answer_as_another  # type: ignore[method-assign]
    (_, row) = play(config_of(f"engine.mode={mode}"), tmp_path / "out", grid, told)
    grid.close()
    (line,) = refusals(told)
    assert re.search(rf"^SuperNode {other} does not take part: .*{why}", line), line
    assert (row["clients"], row["skipped"], row["late"]) == ([0, 1], [], [])


def _facts(**changed: Any) -> Callable[[Message], Message]:
    return lambda reply: with_content(reply, with_facts(reply.content, **changed))


def _text(text: Any) -> Callable[[Message], Message]:
    return lambda reply: with_content(reply, RecordDict({FACTS: ConfigRecord({"json": text})}))


def _client(**changed: Any) -> Callable[[Message], Message]:
    return lambda reply: _facts(client=facts_in(reply.content)["client"] | changed)(reply)


ANSWERS: list[tuple[Callable[[Message], Message], str]] = [
    (lambda reply: with_content(reply, RecordDict()), "it has no facts"),
    (lambda reply: with_content(reply, RecordDict({FACTS: ArrayRecord()})), "it has no facts"),
    (_text("["), "it has no facts"),
    (_text("[" * 100_000), "it has no facts"),
    (_text("[]"), "it has no facts"),
    (_text("{}"), "it has protocol None, and the server 1"),
    (_text(3), "it has no facts"),
    (_facts(versions=[1]), "it has protocol None"),
    (_facts(versions={"protocol": HOSTILE * 1000}), r"it has protocol \\x1b\[2J\\u202e"),
    (_facts(run="another"), "it has joined another run"),
    (_facts(run=None), "it has joined another run"),
    (_facts(refused=[HOSTILE] * 1000), r"\\x1b\[2J"),
    (_facts(client=None), "it does not say which client it is"),
    (_facts(client=[0]), "it does not say which client it is"),
    (_client(id="0"), "it does not say which client it is"),
    (_client(id=True), "it does not say which client it is"),
    (_client(rank=2.0), "it does not say which client it is"),
    (_client(id=-1), "it says that it is client -1 of rank 2 with .* rows, which cannot be"),
    (_client(rank=3), "client 0 of rank 3 with .* rows, which cannot be"),
    (_client(rows=0), "with 0 rows, which cannot be"),
    (_client(rows=10**300), "rows, which cannot be"),
    (lambda reply: with_error(reply, HOSTILE * 1000), r"its machine failed: \\x1b\[2J"),
]


def test_answers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    told: list[str] = []
    grid = MemoryGrid([*({"partition-id": 0} for _ in ANSWERS), *deployed(2)], tmp_path)
    spoilt = {101 + place: garbage for place, (garbage, _) in enumerate(ANSWERS)}

    def tamper(number: int, reply: Message) -> list[Message]:
        return [spoilt[number](reply) if number in spoilt and reply.metadata.message_type == JOIN else reply]

    grid.tamper = tamper
    (_, row) = play(config_of("engine.mode=deployment"), tmp_path / "out", grid, told)
    grid.close()
    for number, (_, why) in zip(spoilt, ANSWERS, strict=True):
        lines = [line for line in refusals(told) if line.startswith(f"SuperNode {number} ")]
        assert lines, number
        assert all(re.search(rf"does not take part: .*{why}", line) for line in lines), (why, lines)
    assert not any(re.search("[\0-\x1f\u202e]", line) or len(line) > 1000 for line in told)
    assert (row["clients"], row["skipped"], row["late"]) == ([0, 1], [], [])


@pytest.fixture(scope="module")
def invited(tmp_path_factory: pytest.TempPathFactory) -> RecordDict:
    """What a server tells a machine that may join."""
    place = tmp_path_factory.mktemp("server")
    config = config_of()
    data = federated_data.load(config)
    model = running.make_base(config, data, place / "base")
    federation = Federation(config, data, None, print, inputs=input_digests(data, model))  # type: ignore[arg-type]
    return invitation(federation, "the run", place)


@pytest.mark.parametrize(
    "name", ["../config.json", "/tmp/config.json", "a/b", "..", ".", "", "a\0b", "x" * 300, "a\\..\\b"]
)
def test_a_file_of_the_base_does_not_leave_its_folder(invited: RecordDict, tmp_path: Path, name: str) -> None:
    content = RecordDict({FACTS: invited[FACTS], "base": ArrayRecord({**invited["base"]})})
    content["base"][name] = arrays_of({"x": torch.zeros(3, dtype=torch.uint8)})["x"]
    joined, reply = machine.join(content, {}, tmp_path / "place" / "run-1", print)
    assert joined is None
    assert "the run's base has a file" in facts_in(reply)["refused"]
    outside = {path for path in tmp_path.rglob("*") if path.is_file()} - {*(tmp_path / "place/run-1/base").iterdir()}
    assert outside == set()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ('method = "fed-avg"', "method .*'fed-avg'"),
        ("rounds = -1", "rounds"),
        ("unknown = 1", "unknown"),
        ("= = =", "the run's settings"),
        ('device = "\x1b[2J"', "the run's settings"),
    ],
)
def test_settings_that_a_machine_does_not_know_are_refused(
    invited: RecordDict, tmp_path: Path, settings: str, why: str
) -> None:
    facts = facts_in(invited)
    own = "\n".join(line for line in facts["settings"].splitlines() if line.split(" ")[0] != settings.split(" ")[0])
    content = RecordDict({FACTS: ConfigRecord({"json": json.dumps(facts | {"settings": f"{settings}\n{own}"})})})
    content["base"] = invited["base"]
    joined, reply = machine.join(content, {}, tmp_path / "run-1", print)
    assert joined is None
    assert re.search(why, facts_in(reply)["refused"])


def test_a_base_that_was_damaged_on_the_way_is_refused(invited: RecordDict, tmp_path: Path) -> None:
    base = ArrayRecord({**invited["base"]})
    (name,) = [name for name in base if name.endswith(".safetensors")]
    base[name] = Array(base[name].numpy() ^ 1)
    joined, reply = machine.join(RecordDict({FACTS: invited[FACTS], "base": base}), {}, tmp_path / "run-1", print)
    assert joined is None
    assert facts_in(reply)["refused"]
