"""Clients: ranks by list, share and memory budget; sampling; numbers of steps and learning rates."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fed import methods
from fed.config import load, parse
from fed.data.tables import DenseTable, Sequences, Split, TextTable
from fed.errors import FedError
from fed.models.head import head_names
from fed.models.shared_model import adapted
from fed.simulation.clients import Estimate, drawn, estimate, learning_rate, local_steps, populate, ranks_within
from fed.simulation.rounds import Federation
from fed.simulation.simulate import simulate
from fed.training.memory import base_bytes, peak_bytes, restart_peak
from fed.types import Client
from tests.support.models import tiny_bert
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data

CLIENTS = tuple(Client(number, 1, n_samples=10) for number in range(20))


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        ("{4 = 0.5, 8 = 0.5}", 20, [4, 8]),
        ("{2 = 0.25, 16 = 0.75}", 4, [16, 2, 16, 16]),
        ("{2 = 0.5, 4 = 0.3, 8 = 0.2}", 10, {2: 5, 4: 3, 8: 2}),
        ("{2 = 0.5, 4 = 0.3, 8 = 0.2}", 7, {2: 4, 4: 2, 8: 1}),
        ("{16 = 1}", 20, [16]),
    ],
)
def test_ranks_by_share_become_a_list_to_deal_from(shares: str, count: int, expected: object, tmp_path: Path) -> None:
    path = tmp_path / "shares.toml"
    path.write_text(f"[clients]\ncount = {count}\nper_round = 1\nranks = {shares}\n")
    ranks = load(path).clients.ranks
    assert ranks == expected if isinstance(expected, list) else Counter(ranks) == expected
    assert (
        load("digits", [f"clients.ranks={shares}", f"clients.count={count}", "clients.per_round=1"]).clients.ranks
        == ranks
    )


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"4": 0.5, "8": 0.4}, r"its shares add up to 0.9; they should add up to 1"),
        ({"four": 1.0}, r"its keys should be ranks from 1 to 256"),
        ({"300": 1.0}, r"its keys should be ranks from 1 to 256"),
        ({"4": 1.5, "8": -0.5}, r"its shares should be above 0"),
        ({"4": 0.5, "32": 0.5}, r"every rank should be at most adapter.rank \(16\)"),
    ],
)
def test_what_are_no_shares_is_refused(ranks: dict, message: str) -> None:
    with pytest.raises(FedError, match=message):
        parse({"clients": {"ranks": ranks}}, where="here")


def test_a_fraction_of_the_clients_a_round() -> None:
    assert load("digits", ["clients.per_round=0.25"]).clients.per_round == 5
    assert load("digits", ["clients.per_round=0.01"]).clients.per_round == 1
    with pytest.raises(FedError, match=r"clients.per_round"):
        load("digits", ["clients.per_round=1.5"])


def test_clients_are_drawn_by_seed_and_round() -> None:
    config = make_config(clients={"per_round": 5})
    first, again, later = (drawn(config, CLIENTS, number) for number in (1, 1, 2))
    assert first == again != later
    assert [client.id for client in first] == sorted({client.id for client in first})
    assert len(first) == 5


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, [3, 3, 3]),
        ({"client_steps": [1, 5]}, [1, 5, 1]),
        ({"local_epochs": 1.0}, [3, 1, 4]),  # 9, 2 and 14 samples in batches of 4
        ({"local_epochs": 0.1}, [1, 1, 1]),
        ({"local_epochs": 2.5}, [6, 3, 9]),
    ],
)
def test_steps_of_a_round(train: dict, expected: list[int]) -> None:
    sizes = (9, 2, 14)
    steps = [local_steps(make_config(train=train), Client(n, 1, size)) for n, size in enumerate(sizes)]
    assert steps == expected


def test_rows_say_how_many_steps_each_client_trained(tmp_path: Path) -> None:
    config = make_config(train={"client_steps": [1, 2, 3, 4]}, rounds=2)
    for row in simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path)[1:]:
        assert row["steps"] == [client + 1 for client in row["clients"]]


def test_learning_rates_are_dealt_out_in_turn() -> None:
    clients = [Client(number, 1, 9) for number in range(3)]
    config = make_config(train={"client_learning_rates": [0.1, 0.2]})
    assert [learning_rate(config, client) for client in clients] == [0.1, 0.2, 0.1]
    assert [learning_rate(make_config(), client) for client in clients] == [2e-2] * 3
    with pytest.raises(FedError, match=r"train.client_learning_rates\[1\] is 0.0: it should be greater than 0"):
        load("digits", ["train.client_learning_rates=[1e-3, 0.0]"])


def test_clients_train_at_their_own_learning_rate(tmp_path: Path) -> None:
    """One step of SGD from one start: the clients' B move in proportion to their rates."""
    train = {"optimizer": "sgd", "weight_decay": 0.0, "local_steps": 1, "batch_size": 30}
    data = make_data(sizes=(9,))
    twins = replace(data, clients=data.clients * 2)
    config = make_config(
        method="fedsa-lora",
        rounds=1,
        clients={"count": 2, "per_round": 2, "ranks": [6]},
        train={**train, "client_learning_rates": [0.1, 0.3]},
    )
    with adapted(config, TinyClassifier(), HEAD) as shared:
        federation = Federation(config, twins, shared, print)
        *_, last = federation.play(federation.beginning())
    slow, fast = (client.memory["body.first"] for client in last.state.clients)
    torch.testing.assert_close(fast, 3 * slow)


def test_epochs_and_steps_by_client_exclude_each_other() -> None:
    with pytest.raises(
        FedError, match=r"train.client_steps is \[1\] and train.local_epochs 2: one of the two may be set"
    ):
        load("digits", ["train.client_steps=[1]", "train.local_epochs=2.0"])


def test_a_budget_affords_the_largest_rank_that_fits() -> None:
    need = Estimate(fixed_bytes=10 * 2**20, module_bytes=2**20)
    assert ranks_within([11.0, 13.9, 14.0, 500.0], need, largest=16) == [1, 3, 4, 16]
    with pytest.raises(FedError, match=r"clients.memory_mib holds 10.5: .* takes about 11.0 MiB on this model"):
        ranks_within([20.0, 10.5], need, largest=16)


@pytest.mark.parametrize("optimizer", [("adamw", 0.0, 2), ("sgd", 0.0, 0), ("sgd", 0.9, 1)])
def test_the_estimate_by_hand(optimizer: tuple[str, float, int]) -> None:
    """Matrices (11, 7) and (5, 11): K + N = 34; fp32. Weights 77 + 11 + 55 + 18; a batch is 4 rows.

    For a batch a module keeps its column of S in both matrices: 2·4 numbers.
    """
    name, momentum, states = optimizer
    config = make_config(train={"optimizer": name, "momentum": momentum})
    with adapted(config, TinyClassifier(), HEAD) as shared:
        need = estimate(shared, config, make_data().clients[0])
        assert (shared.handle.layers["body.first"].rank, shared.base.changed()) == (6, {})
    assert need.module_bytes == 34 * 4 * (2 + states) + 2 * 4 * 4
    assert need.fixed_bytes > 4 * (77 + 11 + 55 + 18) + 4 * 18 * (1 + states)
    with adapted(config, TinyClassifier(), HEAD) as shared:
        frozen = make_config(train={"optimizer": name, "momentum": momentum}, adapter={"unselected": "frozen"})
        assert estimate(shared, frozen, make_data().clients[0]).fixed_bytes == need.fixed_bytes + 6 * 34 * 4


def test_the_estimate_is_of_the_longest_texts() -> None:
    """Rows of 3, 3, 40 and 40 tokens in batches of two: in whatever order they are, the long ones must fit."""
    config = make_config(adapter={"target_modules": "all-linear"}, train={"batch_size": 2})
    found = []
    for lengths in ((3, 3, 40, 40), (40, 40, 3, 3), (40, 40)):
        rows = Sequences.of([[5] * length for length in lengths])
        table = TextTable({"input_ids": rows}, torch.zeros(len(lengths), dtype=torch.int64), pad=0)
        model = tiny_bert()
        with adapted(config, model, head_names(model)) as shared:
            found.append(estimate(shared, config, Split.whole(table)))
    assert found[0] == found[1] == found[2]


def test_factors_in_fp32_over_half_precision_are_counted_as_such() -> None:
    """Values, gradients and two moments of K + N = 34 numbers at 4 bytes; a batch's activations have 2 bytes each."""
    with adapted(make_config(), TinyClassifier().bfloat16(), HEAD) as shared:
        inputs = make_data().clients[0].table.inputs["inputs"].bfloat16()
        split = Split.whole(DenseTable({"inputs": inputs}, make_data().clients[0].table.labels))
        need = estimate(shared, make_config(), split)
        assert need.module_bytes == 34 * 4 * 4 + 2 * 4 * 2
        assert base_bytes(shared) == 2 * (77 + 11 + 55 + 18)


def test_the_peak_of_the_process_does_not_fall() -> None:
    """The operating system counts pages in batches, so two readings may differ a little."""
    cpu, held = torch.device("cpu"), torch.ones(50 * 2**20)
    full = peak_bytes(cpu)
    assert full > held.nbytes
    del held
    restart_peak(cpu)
    assert peak_bytes(cpu) > 0.99 * full


def test_the_peak_where_the_kernel_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = peak_bytes(torch.device("cpu"))
    monkeypatch.setattr("fed.training.memory.STATUS", tmp_path / "none")
    assert peak_bytes(torch.device("cpu")) > 0.5 * said


def test_ranks_from_memory_budgets(tmp_path: Path) -> None:
    config = make_config()
    with adapted(config, TinyClassifier(), HEAD) as shared:
        need = estimate(shared, config, make_data().clients[2])
        budgets = [need.of(rank) / 2**20 for rank in (1, 4, 6)]
        config = make_config(clients={"memory_mib": budgets})
        clients = populate(config, make_data(), shared, methods.find("fed-plora"))
        assert [client.rank for client in clients] == [1, 4, 6, 1]
        assert [client.n_samples for client in clients] == [9, 2, 14, 5]
        with pytest.raises(FedError, match=r"it affords ranks \[1, 4, 6\], and FedIT needs every rank equal"):
            populate(config, make_data(), shared, methods.find("fedit"))
    rows = simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path / "run")
    assert len(rows) == 4
    with pytest.raises(FedError, match=r"clients.memory_mib holds 0.0001"):
        simulate(make_config(clients={"memory_mib": [1e-4]}), make_data(), TinyClassifier(), HEAD, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_ranks_that_are_not_used_are_not_checked() -> None:
    assert load("digits", ["adapter.rank=8", "clients.memory_mib=[4, 8]"]).clients.memory_mib == [4.0, 8.0]


def test_a_method_that_folds_refuses_a_tied_weight_before_anything_runs(tmp_path: Path) -> None:
    config = make_config(method="flora", adapter={"unselected": "frozen"})
    model = TinyClassifier()
    with adapted(config, model, HEAD) as shared:
        shared.handle.layers["body.first"].weight_is_tied = True
        federation = Federation(config, make_data(), shared, print)
        with pytest.raises(FedError, match=r"method is 'flora', which folds into body.first, whose weight another"):
            federation.beginning()


def test_a_client_without_samples_is_named_before_the_run(tmp_path: Path) -> None:
    data = make_data(sizes=(9, 0, 14, 0))
    said = "client 1 of 4 has no samples to train on; fewer clients"
    with pytest.raises(FedError, match=said):
        simulate(make_config(), data, TinyClassifier(), HEAD, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("execution", ["sequential", "cohort"])
def test_a_client_of_one_sample_trains(execution: str, tmp_path: Path) -> None:
    config = make_config(clients={"per_round": 4}, execution=execution, clients_per_pass=4)
    rows = simulate(config, make_data(sizes=(9, 1, 14, 1)), TinyClassifier(), HEAD, tmp_path)
    assert [row["skipped"] for row in rows] == [[]] * 4
