"""Simulated attacks: who attacks, what is sent, what the checks reject, and what rules bound, on short runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fed import methods
from fed.config import load, parse
from fed.data.tables import DenseTable, InstructionTable, Sequences, Split
from fed.errors import FedError
from fed.models.shared_model import adapted
from fed.simulation.attacks import attacked, attackers, training_splits
from fed.simulation.rounds import Federation
from fed.simulation.simulate import simulate
from tests.support.equality import assert_equal
from tests.support.tiny_federation import (
    HEAD,
    TinyClassifier,
    jobs_of,
    make_config,
    make_data,
    make_update,
)

KINDS = ("label-flip", "scale", "sign-flip", "nan", "shape", "replay")


def test_attackers_are_drawn_by_the_seed() -> None:
    drawn = [attackers(load("digits", [f"seed={seed}", "attack.kind=nan", "attack.share=0.3"])) for seed in range(20)]
    assert {len(found) for found in drawn} == {6}
    assert len(set(drawn)) > 15
    assert attackers(load("digits", ["attack.share=0.3"])) == frozenset()
    assert attackers(load("digits", ["attack.kind=nan", "attack.share=1.0"])) == frozenset(range(20))


def test_only_attackers_labels_are_turned() -> None:
    config, data = make_config(attack={"kind": "label-flip", "share": 0.5}), make_data()
    splits = training_splits(config, data)
    assert len({id(split.table) for split in splits}) == 1
    for client, (own, turned) in enumerate(zip(data.clients, splits, strict=True)):
        before, after = own.table.labels[own.rows], turned.table.labels[turned.rows]
        assert torch.equal(after, 2 - before if client in attackers(config) else before)
        assert torch.equal(own.rows, turned.rows)
    test = data.test
    assert torch.equal(test.table.labels[test.rows], make_data().test.table.labels[test.rows])
    assert training_splits(make_config(), data) is data.clients


def test_rows_without_labels_cannot_be_turned() -> None:
    table = InstructionTable(Sequences.of([[1]]), torch.tensor([1]), [["a"]], None, 1)
    data = replace(make_data(), clients=(Split.whole(table),))
    with pytest.raises(FedError, match=r"the rows have no labels; data.task = 'classification' has"):
        training_splits(make_config(attack={"kind": "label-flip"}), data)


@pytest.mark.parametrize("name", ["fed-plora", "ffa-lora", "flora"])
@pytest.mark.parametrize(("kind", "factor"), [("scale", 10.0), ("sign-flip", -10.0)])
def test_a_step_is_made_longer_or_turned_round(kind: str, factor: float, name: str) -> None:
    config = make_config(method=name, attack={"kind": kind}, clients={"ranks": [6]})
    with adapted(config, TinyClassifier(), HEAD) as shared:
        job = jobs_of(shared, config, make_data())[1]
    head = {key: value + 0.5 for key, value in job.head.items()}
    update = replace(make_update(job.start, job.client, seed=3), head=head)
    found = attacked(config.attack, job, update)
    for matrix, pair in found.factors.items():
        chosen = list(job.start.selected[matrix])
        begun = job.start.factors[matrix][0][chosen], job.start.factors[matrix][1][:, chosen]
        for side, one, start, end in zip("AB", pair, begun, update.factors[matrix], strict=True):
            wanted = start + factor * (end - start) if side in job.start.trained else end
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
    for key, value in found.head.items():
        torch.testing.assert_close(value, job.head[key] + factor * 0.5)


def play(directory: Path, resumed: bool = False, **changes: Any) -> tuple[list[dict[str, Any]], list[str]]:
    settings = {"rounds": 4, "clients": {"per_round": 4, "ranks": [1, 2, 6, 6]}} | changes
    said: list[str] = []
    if resumed:
        simulate(make_config(**{**settings, "rounds": 2}), make_data(), TinyClassifier(), HEAD, directory)
    rows = simulate(
        make_config(**settings), make_data(), TinyClassifier(), HEAD, directory, None, said.append, resume=resumed
    )
    return rows, said


@pytest.mark.parametrize("execution", ["sequential", "cohort"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_is_the_same_after_an_interruption(kind: str, execution: str, tmp_path: Path) -> None:
    settings = {
        "attack": {"kind": kind, "share": 0.5, "factor": 3.0},
        "execution": execution,
        "clients_per_pass": 4,
        "measure": {"noise": False},
    }
    whole, _ = play(tmp_path / "whole", **settings)
    cut, _ = play(tmp_path / "cut", resumed=True, **settings)
    for field in ("loss", "skipped", "faults", "attackers"):
        assert [row[field] for row in whole] == [row[field] for row in cut]
    one, other = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other
    hostile = sorted(attackers(make_config(attack={"kind": kind, "share": 0.5})))
    assert [row["attackers"] for row in whole] == [[], *[hostile] * 4]


@pytest.mark.parametrize("name", ["fed-plora", "hetlora", "fedsa-lora", "flexlora"])
@pytest.mark.parametrize("kind", ["nan", "shape", "replay"])
def test_what_is_malformed_or_sent_before_is_rejected(kind: str, name: str, tmp_path: Path) -> None:
    """A replay from the second round on; all honest updates are used, and the model learns."""
    ranks = [6] if methods.find(name).equal_ranks else [1, 2, 6, 6]
    rows, said = play(
        tmp_path, method=name, attack={"kind": kind, "share": 0.5}, clients={"per_round": 4, "ranks": ranks}
    )
    first = 2 if kind == "replay" else 1
    hostile = rows[1]["attackers"]
    assert [row["skipped"] for row in rows] == [[] if row["round"] < first else hostile for row in rows]
    assert len(said) == len(hostile) * (5 - first)
    assert rows[-1]["loss"] < rows[0]["loss"] or methods.find(name).personal  # its global model is no client's


def test_attackers_that_keep_something_do_not_see_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """FedSA-LoRA's clients keep the B that they trained, not what they sent."""
    kept = []
    for kind in ("none", "sign-flip"):
        config = make_config(method="fedsa-lora", rounds=1, clients={"ranks": [6]}, attack={"kind": kind, "share": 0.5})
        with adapted(config, TinyClassifier(), HEAD) as shared:
            federation = Federation(config, make_data(), shared, lambda line: None)
            *_, last = federation.play(federation.beginning())
        kept.append([dict(client.memory) for client in last.state.clients])
    assert_equal(kept[0], kept[1])


DEFENCES: dict[str, dict[str, Any]] = {
    "none": {},
    "clipping": {"max_update_norm": 0.1},
    "median": {"aggregation": "median"},
    "trimmed-mean": {"aggregation": "trimmed-mean", "trim": 0.2},
    "krum": {"aggregation": "krum", "byzantine_share": 0.2},
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float]:
    """The loss of runs with seven clients, all of them in every round and two of them hostile, by attack and defence.

    Every client trains all modules on much the same rows, so that what the rules see is alike but for the attack.
    """
    found = {}
    data = make_data(seed=1, sizes=(40,) * 7, test_size=60)
    for kind in ("none", "label-flip", "scale", "sign-flip"):
        for defence, server in DEFENCES.items():
            config = make_config(
                rounds=10,
                attack={"kind": kind, "share": 2 / 7, "factor": 30.0},
                clients={"count": 7, "per_round": 7, "ranks": [6]},
                train={"batch_size": 16, "local_steps": 5},
                server=server,
                measure={"noise": False, "similarity": False, "memory": False, "clients": False},
                checkpoint_every=0,
            )
            directory = tmp_path_factory.mktemp("run")
            rows = simulate(config, data, TinyClassifier(), HEAD, directory)
            assert [row["skipped"] for row in rows] == [[]] * 11
            found[kind, defence] = rows[-1]["loss"]
            found["start", defence] = rows[0]["loss"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("defence", ["median", "trimmed-mean", "krum"])
@pytest.mark.parametrize("kind", ["scale", "sign-flip", "label-flip"])
def test_a_rule_stays_near_the_clean_run(kind: str, defence: str, losses: dict[tuple[str, str], float]) -> None:
    """Within a fifth of what the clean run gains; without a defence the long steps of two clients undo all of it."""
    gained = losses["start", "none"] - losses["none", "none"]
    assert gained > 0.4
    assert losses[kind, defence] < losses["none", "none"] + 0.2 * gained
    if kind != "label-flip":
        assert losses[kind, defence] < losses[kind, "none"]


@pytest.mark.slow
def test_clipping_bounds_long_steps(losses: dict[tuple[str, str], float]) -> None:
    assert losses["sign-flip", "none"] > losses["start", "none"]
    assert losses["sign-flip", "clipping"] < losses["start", "none"]
    assert losses["scale", "clipping"] < losses["scale", "none"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attack": {"kind": "nan", "share": 0.01}}, "attack.share is 0.01: of 20 clients none would attack"),
        ({"attack": {"kind": "lie"}}, "attack.kind is 'lie': it should be 'none', 'label-flip'"),
        ({"attack": {"factor": 0.0}}, "attack.factor is 0.0"),
        ({"attack": {"kind": "label-flip"}, "data": {"rows_per_client": 9}}, "clients share rows"),
        (
            {
                "attack": {"kind": "label-flip"},
                "model": {"path": "x"},
                "data": {"name": "files", "path": "y", "task": "instruction", "partition_by": "z"},
            },
            "data.task 'instruction': there are no labels",
        ),
        ({"server": {"min_updates": 11}}, r"server.min_updates is 11: it should be at most clients.per_round \(10\)"),
    ],
)
def test_an_attack_that_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FedError, match=said):
        parse(changes, "here")


def test_the_table_of_rows_is_shared_by_a_cohort() -> None:
    splits = training_splits(make_config(attack={"kind": "label-flip", "share": 0.5}), make_data())
    assert isinstance(splits[0].table, DenseTable)
    assert len(Split.joined(splits)) == sum(map(len, splits))


@pytest.mark.parametrize("given", ["nan", '"nan"'])
def test_an_attack_may_be_called_as_toml_calls_a_number(given: str) -> None:
    assert load("digits", [f"attack.kind={given}"]).attack.kind == "nan"
