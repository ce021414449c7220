"""Which modules a client trains: by seed, round and client, whatever the order of calls; uniform."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fed.errors import FedError
from fed.methods.selection import STRATEGIES, Candidates, check_budget, find, uniform_random
from fed.models.shared_model import adapted
from fed.seeding import ClientRandom, permutation, seed_of
from fed.simulation.rounds import Federation, first_state
from fed.training.local import batch_rows, module_gradients
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data

KEY = {"seed": 3, "round_number": 2, "client": 7, "matrix": "layer.0.q_proj", "rank": 16, "budget": 5}


def random_selection(seed: int, round_number: int, client: int, matrix: str, rank: int, budget: int) -> tuple[int, ...]:
    modules = Candidates(matrix, (torch.zeros(rank, 1), torch.zeros(1, rank)))
    return uniform_random(modules, budget, ClientRandom(seed, round_number, client))


def test_selection_is_sorted_distinct_and_of_the_budget() -> None:
    chosen = random_selection(**KEY)
    assert len(set(chosen)) == 5
    assert list(chosen) == sorted(chosen)
    assert all(type(index) is int and 0 <= index < 16 for index in chosen)


def test_selection_does_not_depend_on_the_order_of_calls() -> None:
    keys = [KEY | {"client": client, "matrix": f"layer.{n}"} for client in range(3) for n in range(4)]
    forwards = [random_selection(**key) for key in keys]
    backwards = [random_selection(**key) for key in reversed(keys)]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("change", [{"seed": 4}, {"round_number": 3}, {"client": 8}, {"matrix": "layer.0.v_proj"}])
def test_each_part_of_the_key_gives_another_draw(change: dict[str, int | str]) -> None:
    one = [random_selection(**KEY | {"rank": 200 + n, "budget": 100}) for n in range(3)]
    other = [random_selection(**KEY | change | {"rank": 200 + n, "budget": 100}) for n in range(3)]
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_neighbouring_numbers_do_not_run_together() -> None:
    assert len({seed_of(1, 23), seed_of(12, 3), seed_of("1", 23), seed_of("1,23"), seed_of(1, 2, 3)}) == 5


def test_all_and_none_can_be_selected() -> None:
    assert random_selection(**KEY | {"budget": 16}) == tuple(range(16))
    assert random_selection(**KEY | {"budget": 0}) == ()


def test_a_budget_beyond_the_rank_is_an_error_naming_both() -> None:
    with pytest.raises(FedError, match="client 7 cannot train 17 modules of 16"):
        check_budget(7, 16, 17)
    with pytest.raises(FedError, match="cannot train -1 modules"):
        check_budget(7, 16, -1)


def test_every_module_is_as_likely_as_another() -> None:
    rounds, rank, budget = 2000, 5, 2
    counts = Counter(index for n in range(rounds) for index in random_selection(0, n, 1, "m", rank, budget))
    expected = rounds * budget / rank  # 800, standard deviation 22
    assert all(abs(counts[index] - expected) < 110 for index in range(rank))


def test_the_draw_is_fixed_for_good() -> None:
    assert random_selection(0, 1, 2, "classifier", 8, 3) == (1, 4, 7)
    assert permutation(6, 0, "clients").tolist() == [3, 1, 4, 5, 2, 0]


def test_a_permutation_holds_every_number_once() -> None:
    np.testing.assert_array_equal(np.sort(permutation(37, 1, "x")), np.arange(37))
    assert permutation(0, 1, "x").shape == (0,)


A = torch.tensor([[1.0], [5.0], [2.0], [0.0], [3.0], [1.0]])
B = torch.tensor([[1.0, 1.0, 4.0, 9.0, 1.0, 1.0]])  # norms 1, 5, 8, 0, 3, 1
VISITS = torch.tensor([3, 1, 4, 1, 5, 9])
GRADIENTS = torch.tensor([0.1, 0.2, 0.0, 0.9, 0.3, 0.3], dtype=torch.float64)
MODULES = Candidates("m", (A, B), VISITS, GRADIENTS)


def picks(name: str, budget: int, round_number: int = 1, client: int = 0) -> tuple[int, ...]:
    return STRATEGIES[name](MODULES, budget, ClientRandom(3, round_number, client))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_returns_the_budget_ascending_and_always_the_same(name: str) -> None:
    for budget in range(7):
        chosen = picks(name, budget, client=2)
        assert len(set(chosen)) == budget
        assert list(chosen) == sorted(chosen)
        assert set(chosen) <= set(range(6))
        assert chosen == picks(name, budget, client=2)


def test_the_strategies_by_hand() -> None:
    assert picks("first", 3) == (0, 1, 2)
    assert picks("largest-norm", 3) == (1, 2, 4)
    assert picks("least-visited", 3) == (0, 1, 3)
    assert picks("gradient", 3) == (3, 4, 5)
    # Two neighbouring modules, then the next two; the next client is one round ahead.
    assert [picks("round-robin", 2, number) for number in (1, 2, 3, 4)] == [(0, 1), (2, 3), (4, 5), (0, 1)]
    assert picks("round-robin", 2, 1, client=1) == (2, 3)
    assert picks("round-robin", 4, 2) == (0, 1, 4, 5)


def test_shared_selections_are_the_same_for_all_clients_and_nested_by_rank() -> None:
    assert len({picks("shared-random", 3, client=client) for client in range(5)}) == 1
    assert set(picks("shared-random", 2)) < set(picks("shared-random", 4))
    assert len({picks("shared-random", 3, number) for number in range(1, 9)}) > 3


def test_the_default_is_the_uniform_draw() -> None:
    assert picks("random", 3, 2, 7) == random_selection(3, 2, 7, "m", 6, 3)


@pytest.mark.parametrize("name", ["largest-norm", "least-visited", "gradient"])
def test_equal_scores_are_decided_by_a_keyed_draw(name: str) -> None:
    level = Candidates("m", (torch.ones(8, 2), torch.zeros(3, 8)), torch.zeros(8), torch.zeros(8))
    drawn = {STRATEGIES[name](level, 3, ClientRandom(0, 1, client)) for client in range(20)}
    assert len(drawn) > 10


def test_a_gradient_strategy_without_gradients_says_so() -> None:
    with pytest.raises(FedError, match="client 4 has no gradients for m"):
        STRATEGIES["gradient"](Candidates("m", (A, B)), 2, ClientRandom(0, 1, 4))
    with pytest.raises(FedError, match=r"adapter.selection is 'best'; one of random, shared-random, .* would be right"):
        find("best")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_takes_every_strategy_and_counts_visits(name: str, tmp_path: Path) -> None:
    config = make_config(adapter={"selection": name}, rounds=2)
    with adapted(config, TinyClassifier(), HEAD) as shared:
        federation = Federation(config, make_data(), shared, print)
        *_, last = federation.play(federation.beginning())
        ranks = [(1, 2, 3, 6)[client] for number in (1, 2) for client in clients_of(config, number)]
        for counts in last.state.server.visits.values():
            assert counts.sum().item() == sum(ranks)
        if name == "first":
            assert last.state.server.visits["body.first"].tolist() == [
                sum(rank > module for rank in ranks) for module in range(6)
            ]


def clients_of(config: object, number: int) -> list[int]:
    return sorted(permutation(4, config.seed, number, "clients")[:3].tolist())


def test_gradients_are_those_of_plain_lora_on_the_clients_first_batch() -> None:
    config = make_config(adapter={"selection": "gradient"})
    with adapted(config, TinyClassifier(), HEAD) as shared:
        server = first_state(shared, config)
        split, rng = make_data().clients[0], ClientRandom(0, 1, 0)
        found = module_gradients(shared, server, split, 4, rng)
        model = TinyClassifier()
        factors = {m: [f.clone().requires_grad_() for f in pair] for m, pair in server.adapter.factors.items()}
        batch = split.batch(batch_rows(len(split), 4, 1, rng)[0])
        hidden = batch["inputs"]
        for matrix, (down, up) in factors.items():
            hidden = torch.tanh(model.get_submodule(matrix)(hidden) + 2.0 * hidden @ down.T @ up.T)
        torch.nn.functional.cross_entropy(model.head(hidden), batch["labels"]).backward()
        for matrix, (down, up) in factors.items():
            expected = (down.grad.square().sum(1) + up.grad.square().sum(0)).sqrt()
            torch.testing.assert_close(found[matrix].float(), expected, rtol=1e-5, atol=1e-8)
            assert not down.grad.any()  # B = 0: only b has a gradient
