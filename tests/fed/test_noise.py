"""Initialisation and aggregation noise against cases computed by hand and against dense fp64."""

from __future__ import annotations

import math

import pytest
import torch

from fed import methods
from fed.noise import agg_noise, end_factors, held_update, product_norm, start_noise
from fed.streams import Source
from fed.types import Adapter, Client, ClientStart, ClientUpdate, Factors
from tests.support.tiny_federation import make_server, make_update


def one_by_one(a: float, b: float) -> Factors:
    return torch.tensor([[a]]), torch.tensor([[b]])


def scalar_round(
    ends: list[tuple[float, float]], weights: list[float], scale: float = 1.0
) -> tuple[list[ClientStart], list[ClientUpdate]]:
    """Clients of one 1×1 matrix, R = 1, that end with the given (a, b)."""
    client, chosen = Client(0, rank=1, n_samples=1), {"m": (0,)}
    start = ClientStart({"m": one_by_one(1.0, 0.0)}, chosen, scale, "folded")
    updates = [
        ClientUpdate(client, {"m": one_by_one(a, b)}, chosen, {}, weight, 1, 0.0)
        for (a, b), weight in zip(ends, weights, strict=True)
    ]
    return [start] * len(ends), updates


def test_two_clients_at_plus_and_minus_three_make_nine() -> None:
    """Both have ΔW = 9, the mean factors are 0: the noise is 9, above the 6 of the sum of factor distances."""
    starts, updates = scalar_round([(3.0, 3.0), (-3.0, -3.0)], [1.0, 1.0])
    noise = agg_noise(Adapter({"m": one_by_one(0.0, 0.0)}, 1.0), starts, updates)
    assert noise == pytest.approx(9.0, rel=1e-12)


def test_agg_noise_uses_weights_and_scale() -> None:
    """p = ¼, ¾ and s = 2: Σ p s b a = ¼·2·8 + ¾·2·4 = 10; the server's 2·5·3 = 30."""
    starts, updates = scalar_round([(2.0, 4.0), (1.0, 4.0)], [1.0, 3.0], scale=2.0)
    noise = agg_noise(Adapter({"m": one_by_one(5.0, 3.0)}, 2.0), starts, updates)
    assert noise == pytest.approx(20.0, rel=1e-12)


def test_agg_noise_adds_matrices_in_squares() -> None:
    """Differences of 3 and 4 in two matrices make 5."""
    chosen = {"m": (0,), "n": (0,)}
    factors = {"m": one_by_one(1.0, 4.0), "n": one_by_one(1.0, 5.0)}
    start = ClientStart(factors, chosen, 1.0, "folded")
    update = ClientUpdate(Client(0, 1, 1), factors, chosen, {}, 1.0, 1, 0.0)
    server = Adapter({"m": one_by_one(1.0, 1.0), "n": one_by_one(1.0, 1.0)}, 1.0)
    assert agg_noise(server, [start], [update]) == pytest.approx(5.0, rel=1e-12)


def test_agg_noise_holds_coverage() -> None:
    """Two clients each train their own module from 0 to 2·1: the server has both, the mean of the clients half."""
    A, B = torch.ones(2, 1), torch.zeros(1, 2)
    starts, updates = [], []
    for module in (0, 1):
        start = ClientStart({"m": (A, B)}, {"m": (module,)}, 1.0, "folded")
        sent = {"m": one_by_one(1.0, 2.0)}
        starts.append(start)
        updates.append(ClientUpdate(Client(module, 1, 1), sent, start.selected, {}, 1.0, 1, 0.0))
    noise = agg_noise(Adapter({"m": (A, torch.full((1, 2), 2.0))}, 1.0), starts, updates)
    assert noise == pytest.approx(2.0, rel=1e-12)  # 2 + 2 against ½ (2 + 2)


def test_agg_noise_matches_dense_fp64() -> None:
    server, method = make_server(rank=6), methods.find("fed-plora")
    clients = [Client(number, rank, 1) for number, rank in enumerate((1, 3, 6))]
    starts = [method.start(server, client, Source(0, 1, client.id)) for client in clients]
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
    noise = agg_noise(following.adapter, starts, updates)
    assert noise == pytest.approx(math.sqrt(squares), rel=1e-10)
    assert noise > 1.0


def test_agg_noise_of_one_client_that_trained_everything_is_rounding() -> None:
    server, method = make_server(rank=6), methods.find("fed-plora")
    client = Client(0, rank=6, n_samples=1)
    start = method.start(server, client, Source(0, 1, 0))
    update = make_update(start, client, seed=1)
    assert agg_noise(method.aggregate(server, [update]).adapter, [start], [update]) < 1e-13


def test_end_factors_replace_the_trained_modules_alone() -> None:
    A, B = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0, 5.0, 6.0]])
    start = ClientStart({"m": (A, B)}, {"m": (0, 2)}, 1.0, "folded")
    sent = {"m": (torch.tensor([[10.0], [30.0]]), torch.tensor([[40.0, 60.0]]))}
    end_A, end_B = end_factors(start, ClientUpdate(Client(0, 2, 1), sent, start.selected, {}, 1.0, 1, 0.0), "m")
    assert end_A.flatten().tolist() == [10.0, 2.0, 30.0]
    assert end_B.flatten().tolist() == [40.0, 5.0, 60.0]
    assert A.flatten().tolist() == [1.0, 2.0, 3.0]


def test_start_noise_by_hand() -> None:
    """The server's ΔW is 2·3·1 = 6; the client holds 6 + 3 and 6 − 4 in two matrices: √(9 + 16) = 5."""
    server = Adapter({"m": one_by_one(1.0, 3.0), "n": one_by_one(3.0, 1.0)}, scale=2.0)
    held = [
        ("m", torch.tensor([[9.0]], dtype=torch.float64)),
        ("n", torch.tensor([[2.0]], dtype=torch.float64)),
    ]
    assert start_noise(server, held) == 5.0


def test_held_update_is_what_was_folded_plus_what_is_summed() -> None:
    """Folding 0.3 into the bf16 weight 256 leaves no trace: its step there is 2."""
    original = torch.tensor([[256.0]], dtype=torch.bfloat16)
    folded = (original.double() + 0.3).to(torch.bfloat16)
    A, B = torch.tensor([[0.5]], dtype=torch.bfloat16), torch.tensor([[4.0]], dtype=torch.bfloat16)
    assert held_update(folded, original, A, B, scale=0.25).item() == 0.5
    assert held_update(original + 4, original, A, B, scale=0.25).item() == 4.5


def test_held_update_of_frozen_modules_is_exactly_the_servers() -> None:
    server = make_server(rank=6).adapter
    held = [
        (matrix, held_update(weight, weight, A, B, server.scale))
        for matrix, (A, B) in server.factors.items()
        for weight in [torch.randn(B.shape[0], A.shape[1])]
    ]
    assert start_noise(server, held) == 0.0


def test_product_norm_does_not_cancel() -> None:
    """[L | L(1 + 1e-9)] [M; −M] is 1e-9·LM: squaring before subtracting in fp64 would return noise of 1e-8."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(37, 5, generator=generator, dtype=torch.float64)
    right = torch.randn(5, 29, generator=generator, dtype=torch.float64)
    stacked = product_norm(torch.cat([left, left * (1 + 1e-9)], dim=1), torch.cat([right, -right])).item()
    expected = 1e-9 * torch.linalg.matrix_norm(left @ right).item()
    assert stacked == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("N", "m", "K"), [(1, 1, 1), (3, 9, 2), (50, 4, 37)])
def test_product_norm_is_the_norm_of_the_product(N: int, m: int, K: int) -> None:
    generator = torch.Generator().manual_seed(N)
    left = torch.randn(N, m, generator=generator, dtype=torch.float64)
    right = torch.randn(m, K, generator=generator, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(left @ right).item()
    assert product_norm(left, right).item() == pytest.approx(expected, rel=1e-12)
