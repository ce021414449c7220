"""Initialisation and aggregation noise on cases computed by hand and against dense fp64 matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fed import methods
from fed.methods.low_rank import product_norm
from fed.seeding import ClientRandom
from fed.simulation.noise import agg_noise, agg_noise_module, end_factors, factor_noise, held_update, start_noise
from fed.types import Adapter, Client, ClientStart, ClientUpdate, Factors, ServerState
from tests.support.tiny_federation import make_server, make_update, update_of


def one_by_one(a: float, b: float) -> Factors:
    return torch.tensor([[a]]), torch.tensor([[b]])


def server_of(factors: dict[str, Factors], scale: float) -> ServerState:
    return ServerState(Adapter(factors, scale))


def scalar_round(
    ends: list[tuple[float, float]], weights: list[float], scale: float = 1.0
) -> tuple[list[ClientStart], list[ClientUpdate]]:
    """Return clients of one 1×1 matrix, R = 1, whose training ends at the given (a, b)."""
    start = ClientStart({"m": one_by_one(1.0, 0.0)}, {"m": (0,)}, scale, "folded")
    return [start] * len(ends), [update_of(0, [[a]], [[b]], p) for (a, b), p in zip(ends, weights, strict=True)]


def test_two_clients_at_plus_and_minus_three_make_nine() -> None:
    """Both have ΔW = 9, the mean factors are 0: the noise is 9, above the 6 of the sum of factor distances."""
    starts, updates = scalar_round([(3.0, 3.0), (-3.0, -3.0)], [1.0, 1.0])
    noise = agg_noise(server_of({"m": one_by_one(0.0, 0.0)}, 1.0), starts, updates)
    assert noise == pytest.approx(9.0, rel=1e-12)


def test_agg_noise_uses_weights_and_scale() -> None:
    """p = ¼, ¾ and s = 2: Σ p s b a = ¼·2·8 + ¾·2·4 = 10; the server's 2·5·3 = 30."""
    starts, updates = scalar_round([(2.0, 4.0), (1.0, 4.0)], [1.0, 3.0], scale=2.0)
    noise = agg_noise(server_of({"m": one_by_one(5.0, 3.0)}, 2.0), starts, updates)
    assert noise == pytest.approx(20.0, rel=1e-12)


def test_agg_noise_adds_matrices_in_squares() -> None:
    """Differences of 3 and 4 in two matrices make 5."""
    chosen = {"m": (0,), "n": (0,)}
    factors = {"m": one_by_one(1.0, 4.0), "n": one_by_one(1.0, 5.0)}
    start = ClientStart(factors, chosen, 1.0, "folded")
    update = ClientUpdate(Client(0, 1, 1), factors, chosen, {}, 1.0, 1, 0.0)
    server = server_of({"m": one_by_one(1.0, 1.0), "n": one_by_one(1.0, 1.0)}, 1.0)
    assert agg_noise(server, [start], [update]) == pytest.approx(5.0, rel=1e-12)


def test_agg_noise_holds_coverage() -> None:
    """Two clients each train their own module from 0 to 2·1: the server has both, the mean of the clients half."""
    A, B = torch.ones(2, 1), torch.zeros(1, 2)
    starts, updates = [], []
    for module in (0, 1):
        starts.append(ClientStart({"m": (A, B)}, {"m": (module,)}, 1.0, "folded"))
        updates.append(update_of(module, [[1.0]], [[2.0]], 1.0, selected=starts[-1].selected))
    noise = agg_noise(server_of({"m": (A, torch.full((1, 2), 2.0))}, 1.0), starts, updates)
    assert noise == pytest.approx(2.0, rel=1e-12)  # 2 + 2 against ½ (2 + 2)


def test_agg_noise_matches_dense_fp64() -> None:
    server, method = make_server(rank=6), methods.find("fed-plora")
    clients = [Client(number, rank, 1) for number, rank in enumerate((1, 3, 6))]
    starts = [method.start(server, client, ClientRandom(0, 1, client.id)) for client in clients]
    updates = [
        make_update(start, client, client.id, weight=2.0 + client.id)
        for start, client in zip(starts, clients, strict=True)
    ]
    following = method.aggregate(server, updates)
    squares = 0.0
    for matrix, (A, B) in following.adapter.factors.items():
        difference = 0.5 * B.double() @ A.double()
        for start, update in zip(starts, updates, strict=True):
            end_A, end_B = end_factors(start, update, matrix)
            difference -= update.weight / 9 * 0.5 * end_B.double() @ end_A.double()
        squares += difference.square().sum().item()
    noise = agg_noise(following, starts, updates)
    assert noise == pytest.approx(math.sqrt(squares), rel=1e-10)
    assert noise > 1.0


@pytest.mark.parametrize(("N", "m", "K"), [(1, 1, 1), (3, 9, 2), (50, 4, 37)])
def test_product_norm_is_the_norm_of_the_product(N: int, m: int, K: int) -> None:
    left, right = (torch.randn(shape, dtype=torch.float64) for shape in ((N, m), (m, K)))
    expected = torch.linalg.matrix_norm(left @ right).item()
    assert product_norm(left, right).item() == pytest.approx(expected, rel=1e-12)


def test_agg_noise_of_one_client_that_trained_everything_is_rounding() -> None:
    server, method = make_server(rank=6), methods.find("fed-plora")
    client = Client(0, rank=6, n_samples=1)
    start = method.start(server, client, ClientRandom(0, 1, 0))
    update = make_update(start, client, seed=1)
    assert agg_noise(method.aggregate(server, [update]), [start], [update]) < 1e-13


def test_end_factors_replace_the_trained_modules_alone() -> None:
    A, B = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0, 5.0, 6.0]])
    start = ClientStart({"m": (A, B)}, {"m": (0, 2)}, 1.0, "folded")
    update = update_of(0, [[10.0], [30.0]], [[40.0, 60.0]], 1.0, selected=start.selected)
    end_A, end_B = end_factors(start, update, "m")
    assert end_A.flatten().tolist() == [10.0, 2.0, 30.0]
    assert end_B.flatten().tolist() == [40.0, 5.0, 60.0]
    assert A.flatten().tolist() == [1.0, 2.0, 3.0]


def test_start_noise_by_hand() -> None:
    """The server's ΔW is 2·3·1 = 6; the client has 6 + 3 and 6 − 4 in two matrices: √(9 + 16) = 5."""
    server = server_of({"m": one_by_one(1.0, 3.0), "n": one_by_one(3.0, 1.0)}, 2.0)
    own = {"m": one_by_one(9.0, 1.0), "n": one_by_one(1.0, 2.0)}
    start = ClientStart(own, {"m": (0,), "n": (0,)}, 1.0, "folded")
    assert start_noise(server, start) == pytest.approx(5.0, rel=1e-12)
    # The same if modules are folded: W = 100 became 109 and 102, and no module is summed.
    weights = {
        matrix: (torch.tensor([[100.0 + delta]]), torch.tensor([[100.0]])) for matrix, delta in (("m", 9), ("n", 2))
    }
    assert start_noise(server, replace(start, selected={"m": (), "n": ()}), weights) == 5.0


def test_start_noise_knows_what_is_in_the_shared_base() -> None:
    """The server has 4 in the base and 6 in the adapter; the client has 4.5 in its weight and 6 in its modules."""
    server = replace(server_of({"m": one_by_one(2.0, 3.0)}, 1.0), base_delta={"m": torch.tensor([[4.0]])})
    start = ClientStart(server.adapter.factors, {"m": (0,)}, 1.0, "folded")
    assert start_noise(server, start) == 0.0
    assert start_noise(server, start, {"m": (torch.tensor([[104.5]]), torch.tensor([[100.0]]))}) == 0.5


def test_start_noise_of_fewer_modules_is_what_is_missing() -> None:
    """The first two of three modules: the third, 3·4·2 = 24, is missing; with another scale nothing cancels."""
    A, B = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[5.0, 6.0, 4.0]])
    server = server_of({"m": (A, B)}, 2.0)
    start = ClientStart({"m": (A[:2], B[:, :2])}, {"m": (0, 1)}, 2.0, "folded")
    assert start_noise(server, start) == pytest.approx(24.0, rel=1e-12)
    assert start_noise(server, replace(start, scale=1.0)) == pytest.approx(24.0 + 17.0, rel=1e-12)


def test_held_update_is_what_was_folded_plus_what_is_summed() -> None:
    """Folding 0.3 into the bf16 weight 256 changes nothing, because the spacing there is 2."""
    original = torch.tensor([[256.0]], dtype=torch.bfloat16)
    folded = (original.double() + 0.3).to(torch.bfloat16)
    A, B = torch.tensor([[0.5]], dtype=torch.bfloat16), torch.tensor([[4.0]], dtype=torch.bfloat16)
    assert held_update(folded, original, A, B, scale=0.25).item() == 0.5
    assert held_update(original + 4, original, A, B, scale=0.25).item() == 4.5


def test_the_same_factors_make_no_noise_at_all() -> None:
    server = make_server(rank=6)
    every = {matrix: tuple(range(6)) for matrix in server.adapter.factors}
    assert start_noise(server, ClientStart(server.adapter.factors, every, 0.5, "frozen")) == 0.0


def test_module_noise_by_hand() -> None:
    """s = 2. Module 0: b a = 8 (p 1) and 4 (p 3), mean 5; the server has 4·1.25 = 5. Module 1, one client: 6 against 7.

    Together 2·(5 − 5 + 7 − 6) = 2; nobody trained module 2.
    """
    updates = [update_of(0, [[2.0], [3.0]], [[4.0, 2.0]], 1.0), update_of(0, [[1.0]], [[4.0]], 3.0)]
    server = server_of({"m": (torch.tensor([[1.25], [1.0], [9.0]]), torch.tensor([[4.0, 7.0, 9.0]]))}, 2.0)
    assert agg_noise_module(server, updates) == pytest.approx(2.0, rel=1e-12)


def test_factor_noise_by_hand() -> None:
    """A moved by 3 in one matrix and 4 in another, B did not; of a new module the whole factors count."""
    before = {"m": one_by_one(1.0, 2.0), "n": one_by_one(1.0, 2.0)}
    assert factor_noise({"m": one_by_one(4.0, 2.0), "n": one_by_one(-3.0, 2.0)}, before) == (5.0, 0.0)
    grown = (torch.tensor([[1.0], [6.0]]), torch.tensor([[2.0, 8.0]]))
    assert factor_noise({"m": grown}, before) == (6.0, 8.0)
    assert factor_noise({"m": one_by_one(1.0, 2.0)}, {"m": grown}) == (6.0, 8.0)


def test_modules_that_were_dropped_are_not_in_the_end() -> None:
    A, B = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    start = ClientStart({"m": (A, B)}, {"m": (0, 1)}, 1.0, "folded")
    end_A, end_B = end_factors(start, update_of(0, [[5.0]], [[6.0]], 1.0), "m")
    assert (end_A.flatten().tolist(), end_B.flatten().tolist()) == ([5.0, 0.0], [6.0, 0.0])


def test_product_norm_does_not_cancel() -> None:
    """[L | L(1 + 1e-9)] [M; −M] is 1e-9·LM: squaring before subtracting in fp64 would return noise of 1e-8."""
    left, right = (torch.randn(shape, dtype=torch.float64) for shape in ((37, 5), (5, 29)))
    stacked = product_norm(torch.cat([left, left * (1 + 1e-9)], dim=1), torch.cat([right, -right])).item()
    expected = 1e-9 * torch.linalg.matrix_norm(left @ right).item()
    assert stacked == pytest.approx(expected, rel=1e-5)
