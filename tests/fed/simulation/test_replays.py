"""Updates that are sent a second time are found, also after an interruption; repeated honest training is not one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fed import methods
from fed.errors import FedError
from fed.simulation.replays import REMEMBERED, fingerprint, remembered
from fed.simulation.simulate import simulate
from fed.types import ClientStart, ClientUpdate, Sent, ServerState
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data, update_of

START = ClientStart({"m": (torch.ones(2, 2), torch.ones(1, 2))}, {"m": (0, 1)}, 1.0, "folded")
UPDATE = update_of(0, [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]], 1.0, head={"h": torch.ones(2), "k": torch.zeros(3)})


def changed(values: torch.Tensor, place: int) -> torch.Tensor:
    """Return a copy with the last bit of one number changed."""
    copy = values.clone()
    copy.view(-1).view(torch.int32 if copy.element_size() == 4 else torch.int16)[place] ^= 1
    return copy


def test_a_fingerprint_depends_on_every_bit_and_every_place() -> None:
    (A, B), head, known = UPDATE.factors["m"], UPDATE.head, {fingerprint(START, UPDATE)}
    others = [
        *(replace(UPDATE, factors={"m": (changed(A, place), B)}) for place in range(4)),
        *(replace(UPDATE, factors={"m": (A, changed(B, place))}) for place in range(2)),
        *(replace(UPDATE, head={**head, "h": changed(head["h"], place)}) for place in range(2)),
        replace(UPDATE, factors={"m": (A.flip(0), B)}),
        replace(UPDATE, head={"h": head["k"], "k": head["h"]}),
        replace(UPDATE, selected={"m": (0, 2)}),
        replace(UPDATE, factors={"m": (A.bfloat16(), B)}),
    ]
    for other in others:
        known.add(fingerprint(START, other))
    assert len(known) == 1 + len(others)
    strided = replace(UPDATE, factors={"m": (A.mT.contiguous().mT, B)}, weight=3.0, steps=9, loss=0.1)
    assert fingerprint(START, strided) == fingerprint(START, UPDATE)
    fixed = replace(START, trained="B")
    assert fingerprint(fixed, replace(UPDATE, factors={"m": (2 * A, B)})) == fingerprint(fixed, UPDATE)


def test_so_many_are_remembered() -> None:
    known: tuple[Sent, ...] = ()
    for number in range(REMEMBERED + 3):
        known = remembered(known, Sent(number, number))
    assert [sent.version for sent in known] == [*range(3, REMEMBERED + 3)]


def replaying(name: str, monkeypatch: pytest.MonkeyPatch, first: int = 1) -> None:
    """Let client 1 send the update of round `first` in all later rounds too."""
    method, old = methods.find(name), {}

    def finish(server: ServerState, start: ClientStart, update: ClientUpdate) -> ClientUpdate:
        sent = method.finish(server, start, update)
        if sent.client.id != 1 or server.round + 1 < first:
            return sent
        before = old.setdefault("update", sent)
        return replace(sent, factors=before.factors, head=before.head)

    monkeypatch.setitem(methods.METHODS, name, method._replace(finish=finish))


@pytest.mark.parametrize("name", [name for name, method in methods.METHODS.items() if name not in ("flora", "rolora")])
def test_a_replay_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replaying(name, monkeypatch)
    config, said = make_config(method=name, clients={"per_round": 4, "ranks": [6]}), []
    rows = simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path, None, said.append)
    assert [row["skipped"] for row in rows] == [[], [], [1], [1]]
    fault = "it is the update that it sent for the state after round 0"
    assert [row["faults"] for row in rows] == [[], [], [fault], [fault]]
    assert said == [f"round {number}: client 1 is left out: {fault}" for number in (2, 3)]


def test_a_replay_is_known_after_an_interruption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replaying("fedit", monkeypatch)

    def play(rounds: int, name: str, resume: bool = False) -> list[dict[str, Any]]:
        config = make_config(method="fedit", rounds=rounds, clients={"per_round": 4, "ranks": [6]})
        return simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path / name, resume=resume)

    play(1, "cut")
    assert [row["skipped"] for row in play(3, "cut", resume=True)] == [[], [], [1], [1]]
    assert (tmp_path / "cut/adapter/adapter_model.safetensors").read_bytes() == (
        (play(3, "whole"), (tmp_path / "whole/adapter/adapter_model.safetensors").read_bytes())[1]
    )


def mute(monkeypatch: pytest.MonkeyPatch, silent: Callable[[int, int], bool]) -> None:
    """Let clients send no usable update in some rounds."""
    fedit = methods.METHODS["fedit"]

    def finish(server: ServerState, start: ClientStart, update: ClientUpdate) -> ClientUpdate:
        return replace(update, loss=float("nan")) if silent(server.round + 1, update.client.id) else update

    monkeypatch.setitem(methods.METHODS, "fedit", fedit._replace(finish=finish))


def test_training_from_the_same_state_again_is_no_replay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Client 1 has two rows, of which every batch holds both; at this step size its updates of two rounds are equal."""
    config = make_config(
        method="fedit",
        clients={"per_round": 4, "ranks": [6]},
        train={"optimizer": "sgd", "learning_rate": 1e-12, "weight_decay": 0.0, "local_steps": 1},
    )
    rows = simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path)
    assert [row["skipped"] for row in rows] == [[]] * 4


# ------------------------------------------------------------------------------------------------------ min_updates


def test_too_few_usable_updates_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In round 2 clients 0 and 2 send none that is usable, and three of four are asked for."""
    mute(monkeypatch, lambda number, client: number == 2 and client in (0, 2))
    config, said = (
        make_config(method="fedit", clients={"per_round": 4, "ranks": [6]}, server={"min_updates": 3, "patience": 2}),
        [],
    )
    rows = simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path, None, said.append)
    few = "too few updates are usable: 2 of 3 that server.min_updates asks for"
    assert [row["skipped"] for row in rows] == [[], [], [0, 1, 2, 3], []]
    assert rows[2]["faults"] == ["its training loss is nan", few, "its training loss is nan", few]
    assert (rows[2]["loss"], rows[2]["upload_bytes"]) == (rows[1]["loss"], 0)
    assert rows[3]["loss"] != rows[2]["loss"]
    assert said == [
        *(f"round 2: client {client} is left out: its training loss is nan" for client in (0, 2)),
        f"round 2: {few}; the server keeps its state",
    ]


def test_rounds_with_too_few_count_for_patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mute(monkeypatch, lambda number, client: client in (0, 2))
    config = make_config(
        method="fedit", rounds=9, clients={"per_round": 4, "ranks": [6]}, server={"min_updates": 3, "patience": 2}
    )
    with pytest.raises(FedError, match=r"fewer clients than server.min_updates \(3\) sent a usable update in 2 rounds"):
        simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path)
