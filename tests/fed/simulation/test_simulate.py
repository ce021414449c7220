"""Whole runs of a tiny federation: equalities between runs, the figures in a row, and errors that are reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import plora_kernels as pk
from fed import methods
from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, Split
from fed.experiments.run import centralised
from fed.models.shared_model import adapted
from fed.seeding import ClientRandom
from fed.simulation.evaluation import evaluate
from fed.simulation.rounds import Federation
from fed.simulation.simulate import simulate
from fed.types import Client, ClientStart, ServerState
from tests.support.command_line import FIELDS, rows_of, timeless
from tests.support.equality import assert_equal
from tests.support.tiny_federation import HEAD, LABELS, TinyClassifier, everything, make_config, make_data


def run(config: SimpleNamespace, directory: Path, data: FederatedData | None = None) -> list[dict[str, Any]]:
    return simulate(config, data or make_data(), TinyClassifier(), HEAD, directory)


def spoil(data: FederatedData, clients: set[int]) -> FederatedData:
    """Give some clients a NaN among their features."""

    def spoilt(split: Split) -> Split:
        rows = everything(split)
        rows["inputs"][:, 0] = float("nan")
        return Split.whole(DenseTable({"inputs": rows["inputs"]}, rows["labels"]))

    splits = tuple(spoilt(split) if index in clients else split for index, split in enumerate(data.clients))
    return replace(data, clients=splits)


def saved(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a saved adapter, loaded into a new model."""
    handle = pk.load_peft(TinyClassifier(), directory / "adapter")
    return {name: value.clone() for name, value in handle.model.state_dict().items()}


def test_a_run_has_a_row_a_round_and_says_what_it_measured(tmp_path: Path) -> None:
    rows = run(make_config(), tmp_path / "run")
    assert [list(row) for row in rows] == [FIELDS] * 4
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["clients"] == []
    assert (rows[0]["init_noise"], rows[0]["agg_noise"]) == (None, None)
    assert (rows[0]["upload_bytes"], rows[0]["download_bytes"], rows[0]["train_seconds"]) == (0, 0, 0)
    accuracy, loss = evaluate(TinyClassifier(), make_data().test).values()
    assert (rows[0]["accuracy"], rows[0]["loss"]) == (accuracy, pytest.approx(loss, rel=1e-6))
    for row in rows[1:]:
        assert len(set(row["clients"])) == 3
        assert row["clients"] == sorted(row["clients"])
        assert row["agg_noise"] > 0
        assert row["train_seconds"] > 0
        assert row["skipped"] == []
    assert len({tuple(row["clients"]) for row in rows[1:]}) > 1
    assert rows_of(tmp_path / "run") == rows


def test_training_learns(tmp_path: Path) -> None:
    rows = run(make_config(rounds=12, train={"local_steps": 6}), tmp_path / "run")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_every_row_is_on_disk_when_it_is_announced(tmp_path: Path) -> None:
    seen = []

    def read(row: dict[str, Any]) -> None:
        written = rows_of(tmp_path)
        assert written[-1] == row
        seen.append(len(written))

    simulate(make_config(), make_data(), TinyClassifier(), HEAD, tmp_path, on_round=read)
    assert seen == [1, 2, 3, 4]


def test_an_interrupted_run_leaves_whole_rows_and_the_model_as_it_was(tmp_path: Path) -> None:
    model = TinyClassifier()

    def interrupt(row: dict[str, Any]) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(make_config(), make_data(), model, HEAD, tmp_path, on_round=interrupt)
    assert [row["round"] for row in rows_of(tmp_path)] == [0, 1, 2]
    assert_untouched(model)


def assert_untouched(model: TinyClassifier) -> None:
    before = TinyClassifier().state_dict()
    assert list(model.state_dict()) == list(before)
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []


@pytest.mark.parametrize("unselected", ["folded", "frozen"])
def test_base_weights_and_head_are_bit_identical_after_a_run(tmp_path: Path, unselected: str) -> None:
    model = TinyClassifier()
    config = make_config(adapter={"unselected": unselected})
    simulate(config, make_data(), model, HEAD, tmp_path / "run")
    assert_untouched(model)
    centralised(config, make_data(), model, HEAD, steps=5)
    assert_untouched(model)


def test_the_saved_adapter_and_head_reproduce_the_last_row(tmp_path: Path) -> None:
    rows = run(make_config(), tmp_path)
    model = TinyClassifier()
    pk.load_peft(model, tmp_path / "adapter")
    accuracy, loss = evaluate(model, make_data().test).values()
    assert accuracy == rows[-1]["accuracy"]
    assert loss == pytest.approx(rows[-1]["loss"], rel=1e-9)
    assert not torch.equal(model.head.weight, TinyClassifier().head.weight)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_with_every_rank_equal_to_r_fed_plora_is_fedit_bit_for_bit(tmp_path: Path) -> None:
    same = {"clients": {"ranks": [6]}, "train": {"weighting": "samples"}}
    ours = run(make_config(method="fed-plora", **same), tmp_path / "fed-plora")
    theirs = run(make_config(method="fedit", **same), tmp_path / "fedit")
    assert timeless(ours) == timeless(theirs)
    one, other = saved(tmp_path / "fed-plora"), saved(tmp_path / "fedit")
    assert_equal(one, other)
    assert not torch.equal(one["body.first.lora_B"], torch.zeros(11, 6))


def test_the_same_configuration_gives_the_same_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert timeless(run(make_config(), first)) == timeless(run(make_config(), second))
    weights = Path("adapter", "adapter_model.safetensors")
    assert (first / weights).read_bytes() == (second / weights).read_bytes()
    assert timeless(run(make_config(seed=6), tmp_path / "third")) != timeless(run(make_config(), tmp_path / "fourth"))


def test_folded_and_frozen_give_the_same_curve_to_rounding(tmp_path: Path) -> None:
    folded, frozen = (
        run(make_config(rounds=6, adapter={"unselected": form}), tmp_path / form) for form in ("folded", "frozen")
    )
    assert [row["accuracy"] for row in folded] == [row["accuracy"] for row in frozen]
    for one, other in zip(folded, frozen, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["upload_bytes"] == other["upload_bytes"]


def test_initialisation_noise_is_zero_when_frozen_and_rounding_when_folded(tmp_path: Path) -> None:
    frozen = run(make_config(adapter={"unselected": "frozen"}), tmp_path / "frozen")
    folded = run(make_config(), tmp_path / "folded")
    assert [row["init_noise"] for row in frozen[1:]] == [0.0] * 3
    assert folded[1]["init_noise"] == 0.0  # B = 0: nothing is rounded
    assert all(0.0 < row["init_noise"] < 1e-6 for row in folded[2:])


def test_a_method_joins_by_a_line_in_the_table_and_gets_its_own_randomness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plora, keys, selections = methods.find("fed-plora"), [], []

    def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
        made = plora.start(server, client, rng)
        keys.append((rng.seed, rng.round, rng.client, client.rank))
        selections.append(made.selected)
        return made

    monkeypatch.setitem(methods.METHODS, "recorded", plora._replace(start=start))
    config = make_config(method="recorded", clients={"per_round": 4, "ranks": [1, 2, 3]})
    rows = run(config, tmp_path / "recorded")
    assert keys == [(5, number, client, (1, 2, 3, 1)[client]) for number in (1, 2, 3) for client in range(4)]
    assert len({tuple(selected["body.second"]) for selected in selections[2::4]}) > 1
    config = make_config(clients={"per_round": 4, "ranks": [1, 2, 3]})
    assert timeless(rows) == timeless(run(config, tmp_path / "plain"))


def test_bytes_of_a_round_by_hand(tmp_path: Path) -> None:
    """Matrices (11, 7) and (5, 11), R = 6, fp32; head 5·3 + 3 = 18 numbers; ranks 1, 2, 3, 6."""
    for row in run(make_config(), tmp_path)[1:]:
        ranks = [(1, 2, 3, 6)[client] for client in row["clients"]]
        assert row["download_bytes"] == 3 * (6 * (7 + 11 + 11 + 5) * 4 + 18 * 4)
        indices = sum(2 * 2 * rank for rank in ranks if rank < 6)
        assert row["upload_bytes"] == sum(rank * 34 * 4 + 18 * 4 for rank in ranks) + indices


def test_a_client_with_nan_is_left_out_and_said_so(tmp_path: Path) -> None:
    """Client 2 has NaN in its rows and takes part in every round: the run equals one that averages only the others."""
    config = make_config(clients={"per_round": 4})
    events: list[str] = []
    rows = simulate(config, spoil(make_data(), {2}), TinyClassifier(), HEAD, tmp_path, on_event=events.append)
    assert [row["skipped"] for row in rows] == [[], [2], [2], [2]]
    assert [row["clients"] for row in rows[1:]] == [[0, 1, 2, 3]] * 3
    assert events == [f"round {n}: client 2 is left out: its training loss is nan" for n in (1, 2, 3)]
    assert all(torch.isfinite(value).all() for value in saved(tmp_path).values())
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[1]["agg_noise"] > 0
    for row in rows[1:]:
        assert row["upload_bytes"] == (1 + 2 + 6) * 34 * 4 + 3 * 18 * 4 + 2 * 2 * (1 + 2)
        assert row["download_bytes"] == 4 * (6 * 34 * 4 + 18 * 4)


def test_a_round_without_a_usable_update_keeps_the_servers_state(tmp_path: Path) -> None:
    events: list[str] = []
    data = spoil(make_data(), {0, 1, 2, 3})
    rows = simulate(make_config(rounds=2), data, TinyClassifier(), HEAD, tmp_path, on_event=events.append)
    assert [row["accuracy"] for row in rows] == [rows[0]["accuracy"]] * 3
    assert [row["loss"] for row in rows] == [rows[0]["loss"]] * 3
    assert [row["agg_noise"] for row in rows] == [None] * 3
    assert [row["upload_bytes"] for row in rows] == [0] * 3
    assert events[3] == "round 1: no client sent a usable update; the server keeps its state"
    assert len(events) == 8
    assert torch.equal(saved(tmp_path)["head.weight"], TinyClassifier().head.weight)


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    data = make_data()
    data = replace(data, test=spoil(replace(data, clients=(data.test,)), {0}).clients[0])
    rows = run(make_config(rounds=1), tmp_path, data)
    assert [row["loss"] for row in rows] == [None, None]


def test_a_model_that_does_not_fit_leaves_no_directory(tmp_path: Path) -> None:
    config = make_config(adapter={"target_modules": ["q_proj"]})
    with pytest.raises(pk.TargetError, match="q_proj"):
        run(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_cannot_be_folded_is_found_before_the_run_begins(tmp_path: Path) -> None:
    model = TinyClassifier()
    model.body["tied"] = torch.nn.Linear(7, 11)
    model.body["tied"].weight = model.body["first"].weight
    with pytest.raises(pk.StateError, match="use unselected='frozen'"):
        simulate(make_config(), make_data(), model, HEAD, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert type(model.body["first"]) is torch.nn.Linear
    rows = simulate(make_config(adapter={"unselected": "frozen"}), make_data(), model, HEAD, tmp_path / "run")
    assert len(rows) == 4


def test_a_frozen_head_stays_and_is_not_sent(tmp_path: Path) -> None:
    rows = run(make_config(train={"head": "freeze"}), tmp_path)
    assert all(row["download_bytes"] == 3 * 6 * 34 * 4 for row in rows[1:])
    assert torch.equal(saved(tmp_path)["head.weight"], TinyClassifier().head.weight)


def test_centralised_training_pools_every_client(tmp_path: Path) -> None:
    data = make_data()
    pool = Split.joined(data.clients)
    assert len(pool) == 30
    assert torch.equal(pool.batch(torch.tensor([9, 10]))["labels"], everything(data.clients[1])["labels"])
    before = evaluate(TinyClassifier(), data.test)["loss"]
    result = centralised(make_config(), data, TinyClassifier(), HEAD, steps=60)
    assert list(result) == ["accuracy", "loss", "steps", "train_seconds"]
    assert result["steps"] == 60
    assert result["loss"] < 0.8 * before
    again = centralised(make_config(), data, TinyClassifier(), HEAD, steps=60)
    assert again["loss"] == result["loss"]


def test_a_federation_of_one_with_one_step_a_round_is_central_training(tmp_path: Path) -> None:
    """One client, all modules, plain SGD on the whole data set: rounds are steps, to rounding."""
    data = make_data()
    alone = replace(data, clients=(Split.joined(data.clients),))
    config = make_config(
        rounds=5,
        clients={"count": 1, "per_round": 1, "ranks": [6]},
        train={"optimizer": "sgd", "batch_size": 30, "local_steps": 1, "learning_rate": 0.1, "weight_decay": 0.0},
    )
    rows = run(config, tmp_path, alone)
    result = centralised(config, alone, TinyClassifier(), HEAD, steps=5)
    assert rows[-1]["loss"] == pytest.approx(result["loss"], rel=1e-6)
    assert rows[-1]["loss"] != pytest.approx(rows[0]["loss"], rel=1e-3)
    assert all(row["agg_noise"] < 1e-6 for row in rows[1:])


def test_evaluation_counts_every_sample_once() -> None:
    """With more samples than a batch, accuracy and loss are those of logits computed at once."""
    split, model = make_data(test_size=600).test, TinyClassifier(dropout=0.5)
    metrics, rows = evaluate(model, split), everything(split)
    logits = model(rows["inputs"]).logits.double()
    assert metrics["accuracy"] == (logits.argmax(-1) == rows["labels"]).double().mean().item()
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, rows["labels"]).item(), rel=1e-6)
    assert logits.shape == (600, LABELS)


def test_a_personal_head_stays_with_its_client(tmp_path: Path) -> None:
    config = make_config(train={"head": "personal"}, clients={"per_round": 4})
    with adapted(config, TinyClassifier(), HEAD) as shared:
        federation = Federation(config, make_data(), shared, print)
        rounds = list(federation.play(federation.beginning()))
    clients, server = rounds[-1].state.clients, rounds[-1].state.server
    heads = torch.stack([client.head["head.weight"] for client in clients])
    assert len({tuple(head.flatten().tolist()) for head in heads}) == 4
    torch.testing.assert_close(server.head["head.weight"], heads.mean(0))  # only for the global figures
    assert all(row.row["download_bytes"] == 4 * 6 * 34 * 4 for row in rounds[1:])
    assert all(len(row.row["client_accuracy"]) == 4 for row in rounds[1:])


def test_worst_accuracy_is_that_of_a_client_and_each_has_its_mix_of_labels(tmp_path: Path) -> None:
    data = make_data()
    row = run(make_config(clients={"per_round": 4}), tmp_path, data)[-1]
    model = TinyClassifier()
    pk.load_peft(model, tmp_path / "adapter")
    batch = data.test.batch(torch.arange(len(data.test)))
    right = model.eval()(batch["inputs"]).logits.argmax(-1) == batch["labels"]
    of_label = [right[batch["labels"] == label].double().mean().item() for label in range(LABELS)]
    for client, accuracy in zip(data.clients, row["client_accuracy"], strict=True):
        own = client.batch(torch.arange(len(client)))["labels"].tolist()
        assert accuracy == pytest.approx(sum(of_label[label] for label in own) / len(own))
    assert row["worst_accuracy"] == min(row["client_accuracy"])


def test_a_personal_method_is_judged_with_each_clients_own_model(tmp_path: Path) -> None:
    config = make_config(method="fedsa-lora", clients={"per_round": 4, "ranks": [6]})
    with adapted(config, TinyClassifier(), HEAD) as shared:
        federation = Federation(config, make_data(), shared, print)
        *_, last = federation.play(federation.beginning())
        server, clients = last.state.server, last.state.clients
        own = [client.memory["body.first"] for client in clients]
        assert all(not torch.equal(own[0], other) for other in own[1:])
        federation.metrics.load_personal(last.state, clients[2])
        A, B = shared.handle.factors()["body.first"]
        assert torch.equal(A, server.adapter.factors["body.first"][0])
        assert torch.equal(B, own[2])
        torch.testing.assert_close(server.adapter.factors["body.first"][1], torch.stack(own).mean(0))
    assert len(set(last.row["client_accuracy"])) > 1


def test_what_is_not_to_be_measured_is_null(tmp_path: Path) -> None:
    measure = dict.fromkeys(("noise", "similarity", "memory", "clients"), False)
    config = make_config(measure=measure)
    bare, full = run(config, tmp_path / "bare"), run(make_config(), tmp_path / "full")
    left_out = {name for name in FIELDS if bare[-1][name] is None}
    assert left_out == {
        *("init_noise", "agg_noise", "agg_noise_module", "factor_noise", "factor_noise_A", "factor_noise_B"),
        *("trainable_parameters", "optimizer_bytes", "activation_bytes", "client_accuracy", "worst_accuracy"),
        *("peak_memory_bytes", "clients_per_pass"),  # clients train one after another
        *("tokens_per_second", "padding_share"),  # rows that are no texts
    }
    assert not (tmp_path / "bare" / "similarity").exists()
    assert {path.name for path in (tmp_path / "full" / "similarity").iterdir()} == {"round-1.npz", "round-3.npz"}
    same = set(FIELDS) - left_out - {"fold_seconds", "train_seconds"}
    assert [{name: row[name] for name in same} for row in bare] == [{name: row[name] for name in same} for row in full]


def test_adam_on_the_server_moves_on_where_averages_stop(tmp_path: Path) -> None:
    averaged = run(make_config(), tmp_path / "fedavg")
    stepped = run(make_config(server={"optimizer": "fedadam", "step_size": 0.05}), tmp_path / "fedadam")
    assert stepped[1]["loss"] != averaged[1]["loss"]
    assert stepped[-1]["loss"] < stepped[0]["loss"]


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_bytes_of_a_method_that_folds_by_hand(name: str, tmp_path: Path) -> None:
    """A module is 34 numbers in both matrices, and a weight of 8 bytes in each; everybody takes part in every round."""
    equal = name == "fedex-lora"
    config = make_config(method=name, clients={"per_round": 4, "ranks": [6] if equal else [1, 2, 3, 6]})
    rows = run(config, tmp_path)
    modules = 5 * 6 if equal else 12  # FedEx-LoRA: the mean's as well
    factors = 6 * 34 * 4 if equal else 0
    head, stack = 18 * 4, modules * (34 * 4 + 2 * 8)
    assert [row["download_bytes"] for row in rows[1:]] == [
        4 * (factors + head),
        4 * (factors + head + stack),
        4 * (factors + head + stack),
    ]
    assert rows[1]["upload_bytes"] == (4 * 6 if equal else 12) * 34 * 4 + 4 * head
