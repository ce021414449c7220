"""Each method on cases computed by hand, and the cases in which it is exact or equals another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fed import methods
from fed.methods.low_rank import principal_modules
from fed.seeding import ClientRandom
from fed.simulation.noise import agg_noise, agg_noise_module
from fed.types import Adapter, Client, ClientStart, ClientUpdate, Options, ServerState, Stack
from tests.support.dense import held, mean_of_products
from tests.support.tiny_federation import make_server, make_update, update_of

EXACT = ("flora", "flexlora", "ffa-lora", "fedex-lora", "rolora")


def server_of(A: list[list[float]], B: list[list[float]], scale: float = 2.0, **changes: object) -> ServerState:
    return replace(ServerState(Adapter({"m": (torch.tensor(A), torch.tensor(B))}, scale)), **changes)


# R = 2, K = 2, N = 1. Client 0 has rank 1 and weight 1, client 1 rank 2 and weight 3.
NARROW = update_of(0, [[1.0, 2.0]], [[3.0]], 1.0)
WIDE = update_of(1, [[1.0, 0.0], [0.0, 4.0]], [[2.0, 1.0]], 3.0)
BEFORE = server_of([[9.0, 9.0], [9.0, 9.0]], [[0.0, 0.0]])


def start_and_update(name: str, server: ServerState, ranks: list[int]) -> tuple[list[ClientStart], list[ClientUpdate]]:
    method, starts, updates = methods.find(name), [], []
    for number, rank in enumerate(ranks):
        client = Client(number, rank, n_samples=1, last_round=server.round)
        starts.append(method.start(server, client, ClientRandom(1, server.round + 1, number)))
        update = make_update(starts[-1], client, seed=number + 10 * server.round, weight=1.0 + number)
        updates.append(method.finish(server, starts[-1], update))
    return starts, updates


def test_flora_by_hand() -> None:
    """α = 4: s_0 = 4, s_1 = 2. ¼·4·3·[1, 2] + ¾·2·(2·[1, 0] + 1·[0, 4]) = [3, 6] + [3, 6], on the 10 in the base."""
    before = replace(BEFORE, base_delta={"m": torch.tensor([[10.0, 10.0]])})
    state = methods.find("flora").aggregate(before, [NARROW, WIDE])
    assert torch.equal(state.base_delta["m"], torch.tensor([[16.0, 22.0]]))
    assert state.base_delta["m"].dtype == torch.float32
    assert state.fold["m"].weights.tolist() == [1.0, 1.5, 1.5]
    assert state.adapter is before.adapter


def test_flora_starts_fresh_factors_each_round_on_a_scale_of_the_clients_rank() -> None:
    client, method = Client(4, rank=1, n_samples=1), methods.find("flora")
    first, second = (method.start(replace(BEFORE, round=n), client, ClientRandom(0, n + 1, 4)) for n in (0, 1))
    A, B = first.factors["m"]
    assert (A.shape, B.tolist(), first.scale, first.received) == ((1, 2), [[0.0]], 4.0, "")
    assert A.abs().max() <= 2**-0.5
    assert not torch.equal(A, second.factors["m"][0])
    assert torch.equal(A, method.start(BEFORE, client, ClientRandom(0, 1, 4)).factors["m"][0])
    stabilised = replace(BEFORE, adapter=replace(BEFORE.adapter, rank_stabilized=True))
    assert method.start(stabilised, client, ClientRandom(0, 1, 4)).scale == pytest.approx(2.0 * 2**0.5)


def test_flexlora_by_hand() -> None:
    """¼·2·3·[1, 2] + ¾·2·[2, 4] = [4.5, 9]: one module, b a = 4.5 √5 · [1, 2]/√5 over s = 2."""
    state = methods.find("flexlora").aggregate(BEFORE, [NARROW, WIDE])
    A, B = state.adapter.factors["m"]
    np.testing.assert_allclose(held(state, "m"), [[4.5, 9.0]], rtol=1e-6)
    np.testing.assert_allclose(B.abs().tolist(), [[4.5 * 5**0.5 / 2, 0.0]], rtol=1e-6)
    torch.testing.assert_close(A @ A.T, torch.eye(2), rtol=1e-6, atol=1e-6)


def test_raflora_by_hand() -> None:
    """Module 0: ¼·2·3·[1, 2] + ¾·2·2·[1, 0] = [4.5, 3]; module 1 of the only client that has it: 2·1·[0, 4]."""
    state = methods.find("raflora").aggregate(BEFORE, [NARROW, WIDE])
    np.testing.assert_allclose(held(state, "m"), [[4.5, 11.0]], rtol=1e-6)


@pytest.mark.parametrize("weighting", ["run", "norm"])
def test_hetlora_by_hand(weighting: str) -> None:
    """By the run: q = ¼, ¾. By norm: ‖3·[1, 2]‖ = 3√5 and ‖[2, 4]‖ = 2√5, so q = 0.6, 0.4. Module 1 is diluted."""
    server = replace(BEFORE, options=Options(hetlora_weighting=weighting))
    A, B = methods.find("hetlora").aggregate(server, [NARROW, WIDE]).adapter.factors["m"]
    narrow, wide = (0.25, 0.75) if weighting == "run" else (0.6, 0.4)
    torch.testing.assert_close(A, torch.tensor([[1.0, 2 * narrow], [0.0, 4 * wide]]))
    torch.testing.assert_close(B, torch.tensor([[3 * narrow + 2 * wide, wide]]))


def test_hetlora_gives_the_first_modules_and_prunes_a_shrinking_tail() -> None:
    server = server_of([[1.0], [1.0], [1.0]], [[5.0, 5.0, 5.0]], options=Options(hetlora_prune=True))
    client, method = Client(0, rank=3, n_samples=1), methods.find("hetlora")
    start = method.start(server, client, ClientRandom(0, 1, 0))
    assert (start.penalty.first, start.penalty.weight) == (2, 1e-3)
    grown = update_of(0, [[1.0], [1.0], [1.1]], [[5.0, 5.0, 5.0]], 1.0)
    assert method.finish(server, start, grown).selected == {"m": (0, 1, 2)}
    shrunk = method.finish(server, start, update_of(0, [[1.0], [1.0], [0.9]], [[5.0, 5.0, 5.0]], 1.0))
    assert shrunk.selected == {"m": (0, 1)}
    assert shrunk.factors["m"][0].tolist() == [[1.0], [1.0]]
    assert int(shrunk.memory["rank"]) == 2
    again = method.start(server, replace(client, memory=shrunk.memory), ClientRandom(0, 2, 0))
    assert again.factors["m"][1].shape == (1, 2)
    assert method.start(replace(server, options=Options()), client, ClientRandom(0, 1, 0)).penalty is None


def test_ffa_lora_trains_and_sends_b_alone() -> None:
    server = make_server(rank=4)
    starts, updates = start_and_update("ffa-lora", server, [4, 4, 4])
    assert {(start.trained, start.received) for start in starts} == {("B", "B")}
    assert {update.sent for update in updates} == {"B"}
    after = methods.find("ffa-lora").aggregate(server, updates)
    assert all(after.adapter.factors[m][0] is server.adapter.factors[m][0] for m in after.adapter.factors)


def test_fedex_lora_by_hand() -> None:
    """1×1, s = 2: ends 2·1 and 4·3 at p = ½ mean 2·(1 + 6) = 14; the means make 2·3·2 = 12; the base gets the 2."""
    before = server_of([[1.0]], [[0.0]], base_delta={"m": torch.tensor([[100.0]])})
    updates = [update_of(0, [[1.0]], [[2.0]], 1.0), update_of(1, [[3.0]], [[4.0]], 1.0)]
    state = methods.find("fedex-lora").aggregate(before, updates)
    assert [factor.item() for factor in state.adapter.factors["m"]] == [2.0, 3.0]
    assert state.base_delta["m"].item() == 102.0


def test_fedsa_lora_keeps_b_with_the_client() -> None:
    server = make_server(rank=4)
    starts, updates = start_and_update("fedsa-lora", server, [4, 4])
    assert all(not start.factors["left"][1].any() for start in starts)
    assert {update.sent for update in updates} == {"A"}
    method = methods.find("fedsa-lora")
    after = method.aggregate(server, updates)
    client = Client(1, 4, 1, memory=updates[1].memory)
    A, B = method.start(after, client, ClientRandom(1, 2, 1)).factors["left"]
    assert torch.equal(A, after.adapter.factors["left"][0])
    assert torch.equal(B, updates[1].factors["left"][1])


def test_rolora_alternates_and_sends_what_the_client_lacks() -> None:
    server, method = make_server(rank=4), methods.find("rolora")
    for number, side in ((1, "B"), (2, "A"), (3, "B")):
        starts, updates = start_and_update("rolora", server, [4, 4])
        assert {start.trained for start in starts} == {side}
        following = method.aggregate(server, updates)
        for (A, B), (old_A, old_B) in zip(
            following.adapter.factors.values(), server.adapter.factors.values(), strict=True
        ):
            assert (torch.equal(A, old_A), torch.equal(B, old_B)) == (side == "B", side == "A")
        server = following
        received = {
            seen: method.start(server, Client(0, 4, 1, last_round=seen), ClientRandom(0, 9, 0)).received
            for seen in (0, number)
        }
        assert received == {0: "AB", number: side}


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_make_no_aggregation_noise(name: str, rounds: int) -> None:
    server, method = make_server(rank=6, fresh=True), methods.find(name)
    mixed = not method.equal_ranks
    for _ in range(rounds):
        starts, updates = start_and_update(name, server, [1, 3, 6, 2] if mixed else [6] * 4)
        following = method.aggregate(server, updates)
        size = sum(np.linalg.norm(held(following, matrix)) for matrix in following.adapter.factors)
        assert agg_noise(following, starts, updates) < 1e-6 * size
        if method.by_module:
            assert agg_noise_module(following, updates) < 1e-6 * size
        server = following


@pytest.mark.parametrize("name", ["fedit", "fed-plora", "hetlora", "raflora", "fedsa-lora"])
def test_the_others_do(name: str) -> None:
    server, method = make_server(rank=6), methods.find(name)
    starts, updates = start_and_update(name, server, [6] * 4 if method.equal_ranks else [1, 3, 6, 2])
    assert agg_noise(method.aggregate(server, updates), starts, updates) > 0.1


def test_with_equal_ranks_raflora_is_flexlora() -> None:
    _, updates = start_and_update("flexlora", make_server(rank=6), [6, 6, 6])
    one, other = (methods.find(name).aggregate(make_server(rank=6), updates) for name in ("flexlora", "raflora"))
    for matrix in one.adapter.factors:
        np.testing.assert_allclose(held(one, matrix), held(other, matrix), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_client_starts_from_the_best_approximation_of_its_rank(name: str, rank: int) -> None:
    server, method = make_server(rank=6), methods.find(name)
    server = method.aggregate(server, start_and_update(name, server, [3, 6, 2])[1])
    start = method.start(server, Client(0, rank, 1), ClientRandom(0, 2, 0))
    for matrix, (A, B) in start.factors.items():
        U, S, Vt = np.linalg.svd(held(server, matrix), full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        np.testing.assert_allclose(start.scale * B.double().numpy() @ A.double().numpy(), best, rtol=1e-5, atol=1e-5)


def test_modules_without_a_singular_value_can_still_be_trained() -> None:
    """One client of rank 1: its module, and directions orthonormal to it with b = 0, as many as K has room for."""
    _, (update,) = start_and_update("flexlora", make_server(rank=6), [1])
    after = methods.find("flexlora").aggregate(make_server(rank=6), [update])
    for matrix, room in (("left", 3), ("right", 6)):
        A, B = after.adapter.factors[matrix]
        assert A.shape[0] == B.shape[1] == 6
        assert not B[:, 1:].any()
        torch.testing.assert_close(A[:room] @ A[:room].T, torch.eye(room), rtol=1e-5, atol=1e-6)
        assert not A[room:].any()


@pytest.mark.parametrize(("N", "K", "modules"), [(1, 1, 3), (5, 40, 7), (40, 5, 7), (30, 30, 4)])
def test_the_svd_of_a_stack_is_that_of_the_dense_matrix(N: int, K: int, modules: int) -> None:
    generator = torch.Generator().manual_seed(N)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    stack = Stack(draw(modules, K), draw(N, modules), draw(modules))
    A, B = principal_modules(stack, 0.5, draw(2, K))
    dense = (stack.B * stack.weights) @ stack.A
    torch.testing.assert_close(0.5 * B @ A, dense, rtol=1e-9, atol=1e-9)
    singular = torch.linalg.svdvals(dense)
    rank = min(N, K, modules)
    torch.testing.assert_close(0.5 * B.norm(dim=0)[:rank], singular[:rank], rtol=1e-9, atol=1e-12)
    assert A.shape[0] == max(rank, 2)


def test_flexlora_with_room_for_everything_gives_back_what_came() -> None:
    server = make_server(rank=6)
    _, updates = start_and_update("flexlora", server, [6, 6])
    after = methods.find("flexlora").aggregate(server, updates)
    for matrix in server.adapter.factors:
        np.testing.assert_allclose(held(after, matrix), mean_of_products(server, updates, matrix), rtol=1e-5, atol=1e-5)
