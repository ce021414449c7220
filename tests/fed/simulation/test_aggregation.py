"""Updates that would make the server unusable are left out, and cost nothing but themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fed import methods
from fed.errors import FedError
from fed.models.shared_model import adapted
from fed.simulation.aggregation import Candidate, aggregate_usable
from fed.simulation.round_metrics import finite
from fed.simulation.rounds import Federation
from fed.simulation.simulate import simulate
from fed.types import ClientResult, RunState, ServerState
from tests.support.command_line import rows_of
from tests.support.equality import assert_equal
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data

BROKEN = 2
KEEN, CALM = 1e8, 2e-2


def chosen(faults: Sequence[str | None], sizes: Sequence[float], bad: set[int], needs: int = 0) -> tuple[Any, list]:
    """Aggregate numbered results, unusable with any of `bad` or fewer than `needs`; return what was tried as well."""
    tried = []

    def attempt(results: Sequence[Any]) -> Candidate:
        numbers = [result.client for result in results]
        tried.append(numbers)
        fault = f"with it {numbers} fail" if bad & {*numbers} or len(numbers) < needs else None
        return Candidate(numbers, None, fault)

    results = [ClientResult(number, *[None] * 8, fault) for number, fault in enumerate(faults)]
    return aggregate_usable(results, lambda result: sizes[result.client], attempt), tried


def test_a_round_that_is_usable_is_aggregated_once() -> None:
    found, tried = chosen([None, "nan", None], [9.0, 1.0, 1.0], set())
    assert tried == [[0, 2]]
    assert found.chosen.server == [0, 2]
    assert [result.fault for result in found.results] == [None, "nan", None]


def test_the_largest_update_is_left_out_first() -> None:
    found, tried = chosen([None] * 4, [1.0, 2.0, 9.0, 2.0], {2})
    assert tried == [[0, 1, 2, 3], [0, 1, 3]]
    assert [result.fault for result in found.results] == [None, None, "with it [0, 1, 2, 3] fail", None]


def test_an_update_that_is_only_larger_than_a_bad_one_counts_after_all() -> None:
    """1 is bad; 3, 0 and 2 grew more than it did. The least of these is tried again first."""
    found, tried = chosen([None] * 5, [8.0, 5.0, 6.0, 9.0, 1.0], {1})
    assert tried == [[0, 1, 2, 3, 4], [0, 1, 2, 4], [1, 2, 4], [1, 4], [4], [2, 4], [0, 2, 4], [0, 2, 3, 4]]
    assert found.chosen.server == [0, 2, 3, 4]
    assert [result.fault is None for result in found.results] == [True, False, True, True, True]


def test_where_no_update_is_usable_none_is_chosen() -> None:
    found, tried = chosen([None] * 3, [1.0, 2.0, 3.0], {0, 1, 2})
    assert tried == [[0, 1, 2], [0, 1], [0], [1], [2]]
    assert found.chosen is None
    assert [result.fault for result in found.results] == [f"with it {tried} fail" for tried in ([0], [1], [2])]
    found, tried = chosen(["nan"], [1.0], set())
    assert (found.chosen, tried) == (None, [])


def config_of(name: str, **changes: Any) -> SimpleNamespace:
    """Return the configuration of three rounds with all of four clients, of which client 2 is broken."""
    rates = [KEEN if client == BROKEN else CALM for client in range(4)]
    train = {"client_learning_rates": rates, "local_steps": 1, **changes.pop("train", {})}
    ranks = [6] if methods.find(name).equal_ranks else [1, 2, 3, 6]
    return make_config(method=name, clients={"per_round": 4, "ranks": ranks}, train=train, **changes)


def play(config: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, mute: bool = False) -> tuple[list, list[str]]:
    """Play a run's rounds; with `mute` client 2 says that its loss is NaN, so that it is left out for that."""
    said: list[str] = []
    if mute:
        method = methods.find(config.method)

        def finish(server: Any, start: Any, update: Any) -> Any:
            sent = method.finish(server, start, update)
            return replace(sent, loss=float("nan")) if sent.client.id == BROKEN else sent

        monkeypatch.setitem(methods.METHODS, config.method, method._replace(finish=finish))
    with adapted(config, TinyClassifier(), HEAD) as shared:
        federation = Federation(config, make_data(), shared, said.append)
        return list(federation.play(federation.beginning())), said


def tensors(state: RunState) -> list[object]:
    server = state.server
    kept = [[client.memory, client.head] for client in state.clients]
    fields = (server.head, server.base_delta, server.visits, server.moments)
    return [server.adapter.factors, *map(dict, fields), kept, state.ends]


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_broken_client_costs_only_its_own_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of 1e8 its values are finite. The run equals one that it takes no part in, bit for bit."""
    found, said = play(config_of(name), monkeypatch)
    assert [following.row["skipped"] for following in found] == [[], [BROKEN], [BROKEN], [BROKEN]]
    assert len(said) == 3
    for number, line in enumerate(said, start=1):
        assert line.startswith(f"round {number}: client {BROKEN} is left out: it grew ")
    assert found[-1].row["loss"] < found[0].row["loss"]
    expected, _ = play(config_of(name), monkeypatch, mute=True)
    for one, other in zip(found, expected, strict=True):
        assert_equal(tensors(one.state), tensors(other.state))
        assert one.row["loss"] == other.row["loss"]


@pytest.mark.parametrize("execution", ["sequential", "cohort"])
@pytest.mark.parametrize("changes", [{"server": {"optimizer": "fedadam"}}, {"train": {"head": "personal"}}])
def test_moments_and_personal_heads_stay_healthy(
    changes: dict[str, Any], execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("fed-plora", execution=execution, clients_per_pass=4, **changes)
    found, _ = play(config, monkeypatch)
    assert [following.row["skipped"] for following in found] == [[], [BROKEN], [BROKEN], [BROKEN]]
    expected, _ = play(config, monkeypatch, mute=True)
    assert_equal(tensors(found[-1].state), tensors(expected[-1].state))
    start = found[0].state.clients[BROKEN]
    assert_equal(dict(found[-1].state.clients[BROKEN].head), dict(start.head))


@pytest.mark.parametrize("rate", [1e12, 1e30])
@pytest.mark.parametrize("name", ["fed-plora", "flora", "flexlora", "fedex-lora"])
def test_where_every_client_is_broken_the_server_keeps_its_state_bit_for_bit(
    name: str, rate: float, tmp_path: Path
) -> None:
    """The rows are valid JSON, and what is saved is finite."""
    config = config_of(name, train={"client_learning_rates": [rate], "local_steps": 3}, rounds=2)
    said: list[str] = []
    rows = simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path, None, said.append)
    assert rows_of(tmp_path) == rows
    assert [row["skipped"] for row in rows] == [[], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [row["loss"] for row in rows] == [rows[0]["loss"]] * 3
    assert said[4] == "round 1: no client sent a usable update; the server keeps its state"


def test_a_state_from_which_no_client_can_train_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """All clients are equally keen, so none stands out; the state is finite, but training from it is not."""
    config = config_of("fedit", train={"client_learning_rates": [1e10], "local_steps": 2}, rounds=1)
    found, said = play(config, monkeypatch)
    assert found[1].row["skipped"] == [0, 1, 2, 3]
    assert all("could not train on: its " in line or "its training loss is" in line for line in said[:4])
    assert_equal(found[1].state.server.adapter.factors, found[0].state.server.adapter.factors)


def test_an_update_whose_aggregate_cannot_be_decomposed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 products of 1e200 are infinite, of which there is no SVD."""
    flexlora = methods.METHODS["flexlora"]

    def finish(server: ServerState, start: Any, update: Any) -> Any:
        if update.client.id != BROKEN:
            return update
        huge = {
            matrix: (torch.full_like(A, 1e200), torch.full_like(B, 1e200)) for matrix, (A, B) in update.factors.items()
        }
        return replace(update, factors=huge)

    monkeypatch.setitem(methods.METHODS, "flexlora", flexlora._replace(finish=finish))
    config, said, data = config_of("flexlora", rounds=1), [], make_data()
    inputs = data.test.table.inputs
    inputs["inputs"] = inputs["inputs"].double()
    with adapted(config, TinyClassifier().double(), HEAD) as shared:
        federation = Federation(config, data, shared, said.append)
        *_, last = federation.play(federation.beginning())
    assert last.row["skipped"] == [BROKEN]
    assert "with it the server's update has no decomposition (" in said[0]
    assert "\n" not in said[0]


def test_a_weight_that_overflows_when_folded_is_no_ones_but_the_largest_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sum of base and update of 1e5 is finite in float32, as it is saved, and infinite in a float16 weight."""
    flora = methods.METHODS["flora"]

    def finish(server: ServerState, start: Any, update: Any) -> Any:
        if update.client.id != BROKEN:
            return update
        spoilt = {}
        for matrix, (A, B) in update.factors.items():
            A, B = torch.zeros_like(A), torch.zeros_like(B)
            A[0, 0], B[0, 0] = 4e2, 4e2
            spoilt[matrix] = (A, B)
        return replace(update, factors=spoilt)

    monkeypatch.setitem(methods.METHODS, "flora", flora._replace(finish=finish))
    monkeypatch.setattr("fed.simulation.rounds.LARGE_GROWTH", 1e9)  # by which it would be left out before it is tried
    monkeypatch.setattr(
        "fed.simulation.round_metrics.evaluate_held_out", lambda *given, **named: {"accuracy": 1.0, "loss": 1.0}
    )
    config, said, data = config_of("flora", rounds=1, train={"head": "freeze"}), [], make_data()
    inputs = data.test.table.inputs
    inputs["inputs"] = inputs["inputs"].half()
    with adapted(config, TinyClassifier().half(), ()) as shared:
        federation = Federation(config, data, shared, said.append)
        *_, last = federation.play(federation.beginning())
    assert last.row["skipped"] == [BROKEN]
    assert "with it the weight of body.first would hold NaN or infinity" in said[0]


def test_healthy_rounds_are_aggregated_and_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config, calls = make_config(), []
    with adapted(config, TinyClassifier(), HEAD) as shared:
        federation = Federation(config, make_data(), shared, pytest.fail)
        attempt = Federation.attempt
        monkeypatch.setattr(Federation, "attempt", lambda *given: calls.append("attempt") or attempt(*given))
        monkeypatch.setattr(Federation, "training_fault", pytest.fail)
        monkeypatch.setattr(
            "fed.simulation.round_metrics.evaluate_held_out",
            lambda *given, **named: calls.append("evaluate") or {"accuracy": 0.5, "loss": 1.0},
        )
        list(federation.play(federation.beginning()))
    assert calls == ["evaluate", *["attempt", "evaluate"] * 3]


def test_metrics_that_were_not_finite_before_are_no_ones_fault(tmp_path: Path) -> None:
    """A NaN among the test rows makes every loss NaN: the clients' updates are used all the same."""
    data = make_data()
    data.test.table.inputs["inputs"][data.test.rows[0]] = float("nan")
    rows = simulate(make_config(), data, TinyClassifier(), HEAD, tmp_path)
    assert [row["skipped"] for row in rows] == [[]] * 4
    assert [row["loss"] for row in rows] == [None] * 4


def test_a_run_ends_after_rounds_without_a_usable_update(tmp_path: Path) -> None:
    config = config_of("fedit", train={"client_learning_rates": [1e30]}, rounds=9, server={"patience": 3})
    said = (
        "no client sent a usable update in 3 rounds in a row, up to round 3: server.patience is 3; a new "
        "run with a smaller train.learning_rate or other data would be right, or server.patience = 0 in the run's "
        "config.toml to go on regardless"
    )
    with pytest.raises(FedError) as caught:
        simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path)
    assert str(caught.value) == said
    assert [row["round"] for row in rows_of(tmp_path)] == [0, 1, 2, 3]
    patient = config_of("fedit", train={"client_learning_rates": [1e30]}, rounds=9, server={"patience": 0})
    assert len(simulate(patient, make_data(), TinyClassifier(), HEAD, tmp_path / "patient")) == 10


def test_a_usable_update_starts_the_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients are broken in rounds 1, 2, 4 and 5."""
    fedit = methods.METHODS["fedit"]

    def finish(server: ServerState, start: Any, update: Any) -> Any:
        return update if server.round == 2 else replace(update, loss=float("nan"))

    monkeypatch.setitem(methods.METHODS, "fedit", fedit._replace(finish=finish))
    config = make_config(method="fedit", clients={"ranks": [6]}, rounds=5, server={"patience": 3})
    found, _ = play(config, monkeypatch)
    assert [following.state.server.idle_rounds for following in found] == [0, 1, 2, 0, 1, 2]


def test_figures_that_are_not_finite_are_null() -> None:
    infinite, nothing = float("inf"), float("nan")
    row = finite({"a": infinite, "b": nothing, "c": [1.0, -infinite], "d": 1e308, "e": 3, "f": None, "g": [2]})
    assert row == {"a": None, "b": None, "c": [1.0, None], "d": 1e308, "e": 3, "f": None, "g": [2]}
    json.dumps(row, allow_nan=False)


def test_noise_that_overflows_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fed.simulation.round_metrics.start_noise", lambda *given: 1e308)  # the sum of three overflows
    monkeypatch.setattr("fed.simulation.round_metrics.agg_noise", lambda *given: float("inf"))
    rows = simulate(make_config(rounds=1), make_data(), TinyClassifier(), HEAD, tmp_path)
    assert (rows[1]["init_noise"], rows[1]["agg_noise"]) == (None, None)
    assert rows[1]["loss"] == pytest.approx(rows_of(tmp_path)[1]["loss"])
    assert not torch.isnan(torch.tensor(rows[1]["loss"]))
