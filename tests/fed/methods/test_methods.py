"""What holds for every method; Fed-PLoRA and FedIT by hand and against each other."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from fed import methods
from fed.errors import FedError
from fed.seeding import ClientRandom
from fed.types import Adapter, Client, ClientUpdate, ServerState
from tests.support.dense import REFERENCES, held
from tests.support.equality import assert_equal
from tests.support.tiny_federation import make_server, make_update, update_of

PLORA, FEDIT = methods.find("fed-plora"), methods.find("fedit")


def tensors(state: ServerState) -> list[object]:
    return [state.adapter.factors, state.head]


def updates_of(server: ServerState, ranks: list[int], method: methods.Method = PLORA) -> list[ClientUpdate]:
    updates = []
    for number, rank in enumerate(ranks):
        client = Client(number, rank, n_samples=10 * (number + 1))
        start = method.start(server, client, ClientRandom(1, server.round + 1, number))
        update = make_update(start, client, seed=number + 10 * server.round, weight=1.0 + number)
        updates.append(method.finish(server, start, update))
    return updates


def ranks_for(name: str, rank: int = 6) -> list[int]:
    return [rank] * 6 if methods.find(name).equal_ranks else [1, 2, 3, rank, 4, 2]


def matrices(state: ServerState) -> list[np.ndarray]:
    """Return what the state stands for: ΔW of every matrix, and the head."""
    return [held(state, matrix) for matrix in state.adapter.factors] + [h.double().numpy() for h in state.head.values()]


def after(name: str, rounds: int) -> ServerState:
    """Return a server some rounds after its start at B = 0."""
    server, method = make_server(rank=6, fresh=True), methods.find(name)
    for _ in range(rounds):
        server = method.aggregate(server, updates_of(server, ranks_for(name), method))
    return server


@pytest.mark.parametrize("rounds", [0, 1, 2])
@pytest.mark.parametrize("name", methods.METHODS)
def test_a_round_is_what_dense_matrices_say(name: str, rounds: int) -> None:
    server, method = after(name, rounds), methods.find(name)
    updates = updates_of(server, ranks_for(name), method)
    following = method.aggregate(server, updates)
    assert following.round == rounds + 1
    for matrix in server.adapter.factors:
        expected = REFERENCES[name](server, updates, matrix)
        error = np.linalg.norm(held(following, matrix) - expected)
        assert error <= 1e-6 * np.linalg.norm(expected)


def test_fed_plora_aggregates_as_computed_by_hand() -> None:
    """R = 3, K = 2, N = 1. Client 0 (weight 1) trained modules 0 and 1, client 1 (weight 3) module 1; nobody 2."""
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    B = torch.tensor([[10.0, 20.0, 30.0]])
    server = ServerState(Adapter({"m": (A, B)}, scale=2.0), {"head.bias": torch.zeros(2)}, round=4)
    one_head, other_head = ({"head.bias": torch.tensor(bias)} for bias in ([4.0, 0.0], [0.0, 4.0]))
    first = update_of(0, [[5.0, 6.0], [4.0, 8.0]], [[11.0, 12.0]], 1.0, head=one_head)
    second = update_of(1, [[8.0, 4.0]], [[16.0]], 3.0, head=other_head, selected={"m": (1,)})
    state = PLORA.aggregate(server, [first, second])
    got_A, got_B = state.adapter.factors["m"]
    # Module 1: (1·[4, 8] + 3·[8, 4]) / 4 = [7, 5] and (1·12 + 3·16) / 4 = 15.
    assert torch.equal(got_A, torch.tensor([[5.0, 6.0], [7.0, 5.0], [3.0, 3.0]]))
    assert torch.equal(got_B, torch.tensor([[11.0, 15.0, 30.0]]))
    assert torch.equal(state.head["head.bias"], torch.tensor([1.0, 3.0]))
    assert (state.round, state.adapter.scale) == (5, 2.0)


@pytest.mark.parametrize("name", methods.METHODS)
def test_aggregation_does_not_depend_on_the_order_of_updates(name: str) -> None:
    server, method = after(name, 1), methods.find(name)
    updates = updates_of(server, ranks_for(name), method)
    expected = matrices(method.aggregate(server, updates))
    shuffle = random.Random(0)
    for _ in range(5):
        shuffle.shuffle(updates)
        for got, want in zip(matrices(method.aggregate(server, updates)), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_modules_nobody_trained_keep_their_value_bit_for_bit() -> None:
    server = make_server(rank=6)
    updates = updates_of(server, [1, 2])
    state = PLORA.aggregate(server, updates)
    for matrix, (A, B) in server.adapter.factors.items():
        trained = {index for update in updates for index in update.selected[matrix]}
        idle = [index for index in range(6) if index not in trained]
        assert idle
        got_A, got_B = state.adapter.factors[matrix]
        assert torch.equal(got_A[idle], A[idle])
        assert torch.equal(got_B[:, idle], B[:, idle])
        for index in trained:
            assert not torch.equal(got_A[index], A[index])


def test_with_every_rank_equal_to_r_fed_plora_is_fedit_bit_for_bit() -> None:
    server = make_server(rank=6)
    ours, theirs = (updates_of(server, [6] * 3, method) for method in (PLORA, FEDIT))
    assert [update.selected for update in ours] == [update.selected for update in theirs]
    assert_equal(tensors(PLORA.aggregate(server, ours)), tensors(FEDIT.aggregate(server, theirs)))


def test_fedit_is_the_weighted_mean_of_the_factors() -> None:
    server = make_server(rank=4)
    updates = updates_of(server, [4, 4, 4], FEDIT)
    state = FEDIT.aggregate(server, updates)
    for matrix in server.adapter.factors:
        for side in (0, 1):
            mean = sum(update.weight / 6 * update.factors[matrix][side].double() for update in updates)
            torch.testing.assert_close(state.adapter.factors[matrix][side], mean.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_changes_nothing_it_is_given(name: str) -> None:
    server, method = after(name, 1), methods.find(name)
    before = copy.deepcopy(server)
    updates = updates_of(server, [6, 6], method)
    sent = copy.deepcopy([update.factors for update in updates])
    method.aggregate(server, updates)
    assert server.round == 1
    for name in ("base_delta", "visits", "head"):
        assert_equal(getattr(server, name), getattr(before, name))
    assert_equal(server.adapter.factors, before.adapter.factors)
    assert_equal([update.factors for update in updates], sent)


def test_fed_plora_starts_with_all_modules_and_trains_as_many_as_the_client_affords() -> None:
    server = make_server(rank=6, unselected="frozen")
    start = PLORA.start(server, Client(3, rank=2, n_samples=1), ClientRandom(1, 1, 3))
    assert start.factors is server.adapter.factors
    assert (start.scale, start.unselected) == (0.5, "frozen")
    assert [len(chosen) for chosen in start.selected.values()] == [2, 2]
    again = PLORA.start(server, Client(3, rank=2, n_samples=1), ClientRandom(1, 1, 3))
    assert again.selected == start.selected


def test_methods_of_one_rank_refuse_a_client_of_another() -> None:
    for name in (name for name, method in methods.METHODS.items() if method.equal_ranks):
        with pytest.raises(FedError, match=f"client 3 has rank 2, left has 6 modules; {name} needs"):
            methods.find(name).start(make_server(rank=6), Client(3, rank=2, n_samples=1), ClientRandom(1, 1, 3))


def test_half_precision_is_averaged_in_full_and_cast_once() -> None:
    """300 values of 1 + 2⁻⁷: a bf16 running sum would stick at 256."""
    one, step = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 1 + 2**-7, dtype=torch.bfloat16)
    server = replace(make_server(), adapter=Adapter({}, 1.0), head={"h": one})
    client = Client(0, rank=1, n_samples=1)
    updates = [ClientUpdate(client, {}, {}, {"h": step}, 1.0, 1, 0.0) for _ in range(300)]
    assert torch.equal(PLORA.aggregate(server, updates).head["h"], step)


def test_an_unknown_method_is_an_error_naming_those_there_are() -> None:
    with pytest.raises(FedError, match=r"method is 'fedavg'; one of fed-plora, fedit, .*, raflora would be right"):
        methods.find("fedavg")
