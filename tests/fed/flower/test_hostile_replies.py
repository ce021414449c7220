"""Replies that are broken or hostile, thousands of them: what can be used is used, the rest is left out by name."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fed import config as configuration
from fed.config import RunConfig
from fed.flower.bundles import bundled
from tests.support.hostile import watched
from tests.support.recorded_grid import Played, RecordedRound, mean_of, named, recorded_round
from tests.support.reply_mutations import tampered, with_content, with_error

SETTINGS = [
    *("rounds=3", "clients.count=4", "clients.per_round=3", "clients.ranks=[1, 2, 4, 3]", "adapter.rank=4"),
    *("model.dtype=float64", "model.pretrain_steps=5", "data.train_rows=80", "data.test_rows=20", "threads=1"),
    # A machine that is connected and never answers is waited for without a deadline.
    *("engine.wait=5", "engine.deadline=2.0"),
    *("train.local_steps=1", "measure.noise=false", "measure.clients=false", "measure.memory=false"),
]
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u202e]")


def config_of(mode: str, *more: str) -> RunConfig:
    return configuration.load("digits", [*SETTINGS, f"engine.mode={mode}", *more])


@pytest.fixture(scope="module", params=["simulation", "deployment"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordedRound]:
    nodes = [{}, {}] if request.param == "simulation" else [{"partition-id": number} for number in range(4)]
    with recorded_round(config_of(request.param), nodes, tmp_path_factory.mktemp(request.param)) as own:
        yield own


def check(recorded: RecordedRound, played: Played) -> None:
    """Check that a round used some updates exactly, and says of each other client why it has none."""
    row = played.round.row
    assert sorted([*row["clients"], *row["late"]]) == recorded.drawn
    assert set(row["skipped"]) <= set(row["clients"])
    for client in (*row["skipped"], *row["late"]):
        reasons = [
            line for line in played.told if re.match(rf"round 2: client {client} (is left out|gave no update): .", line)
        ]
        assert len(reasons) == 1, (client, played.told)
    for line in played.told:
        assert not _UNPRINTABLE.search(line), ascii(line)
        assert len(line) < 1000
    expected = mean_of(recorded.before.server, {client: played.content_of(client) for client in played.used})
    found = named(played.round.state.server)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-13, err_msg=name)


def fuzz(recorded: RecordedRound, random: Random) -> Played:
    """Play the round with one machine's reply tampered with, check it, and return it."""
    hit = random.choice(list(recorded.grid.nodes))
    with watched(30):
        played = recorded.play(
            lambda number, reply: tampered(random, reply, recorded.earlier) if number == hit else [reply]
        )
    check(recorded, played)
    return played


def test_an_honest_round_uses_every_update(recorded: RecordedRound) -> None:
    played = recorded.play()
    check(recorded, played)
    assert len(played.used) == 3
    assert played.round.row["skipped"] == played.round.row["late"] == []


def test_an_honest_round_is_the_same_with_its_tensors_bundled(recorded: RecordedRound) -> None:
    expected = named(recorded.play().round.state.server)
    played = recorded.play(lambda number, reply: [with_content(reply, bundled(reply.content))])
    check(recorded, played)
    assert played.used == recorded.drawn
    for name, value in named(played.round.state.server).items():
        np.testing.assert_array_equal(value, expected[name])


# A seed, because how often a machine is asked again depends on time, and with it how many numbers are drawn.
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_tampered_replies_are_used_or_left_out_by_name(recorded: RecordedRound, seed: int) -> None:
    fuzz(recorded, Random(seed))


@pytest.mark.slow
def test_thousands_of_tampered_replies_change_nothing_else(recorded: RecordedRound) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"used": 0, "left out": 0, "late": 0}
    for seed in range(3000):
        row = fuzz(recorded, Random(seed)).round.row
        outcomes["late"] += bool(row["late"])
        outcomes["left out"] += bool(row["skipped"])
        outcomes["used"] += len(row["clients"]) - len(row["skipped"]) == 3
    assert min(outcomes["used"], outcomes["left out"]) > 300, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def reason(played: Played, client: int) -> str:
    """Return why a client's update is left out."""
    row = played.round.row
    return row["faults"][row["skipped"].index(client)]


@pytest.mark.parametrize("sent", ["earlier", "another's", "another message's"])
def test_a_reply_to_another_message_is_left_out(recorded: RecordedRound, sent: str) -> None:
    first = recorded.grid_numbers()[0]
    replies: dict[int, RecordDict] = {}

    def note(number: int, reply: Message) -> list[Message]:
        replies[number] = reply.content
        return [reply]

    recorded.play(note)
    other = {
        "earlier": recorded.earlier,
        "another's": replies[recorded.grid_numbers()[-1]],
        "another message's": replies[first],
    }[sent]
    played = recorded.play(lambda number, reply: [with_content(reply, other) if number == first else reply])
    check(recorded, played)
    assert played.round.row["skipped"]
    why = "it is of round 1, and this is round 2" if sent == "earlier" else "it answers another message of this round"
    for client in played.round.row["skipped"]:
        assert reason(played, client).startswith(f"its reply cannot be used: {why}")


@pytest.mark.parametrize("order", ["twice", "after an error", "before an error"])
def test_no_client_counts_twice(recorded: RecordedRound, order: str) -> None:
    first = recorded.grid_numbers()[0]
    expected = named(recorded.play().round.state.server)
    failed: list[int] = []

    def tamper(number: int, reply: Message) -> list[Message]:
        if number != first or order == "twice":
            return [reply, reply]
        if failed:
            return [reply]
        failed.append(number)
        error = with_error(reply, "the machine failed")
        return [error, reply] if order == "after an error" else [reply, error]

    played = recorded.play(tamper)
    check(recorded, played)
    assert played.used == recorded.drawn
    for name, value in named(played.round.state.server).items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_reply_that_arrives_rounds_later_is_not_taken(recorded: RecordedRound) -> None:
    kept: list[Message] = []

    def note(number: int, reply: Message) -> list[Message]:
        kept.append(reply)
        return [reply]

    recorded.play(note)
    played = recorded.play(lambda number, reply: [*kept, reply, *kept])
    check(recorded, played)
    assert played.used == recorded.drawn
