"""Clipping by module: its limit holds on the whole way, what is within it is kept, and hostile pairs do not pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed import methods
from fed.config import parse
from fed.errors import FedError
from fed.seeding import ClientRandom
from fed.simulation.clipping import clip
from fed.simulation.simulate import simulate
from fed.types import Client, ClientStart, ClientUpdate
from tests.support.equality import assert_equal
from tests.support.tiny_federation import (
    HEAD,
    TinyClassifier,
    make_config,
    make_data,
    make_server,
    make_update,
    update_of,
)


def pair(a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {"m": (a[None].double(), b[:, None].double())}


def clipped(begun: tuple[Tensor, Tensor], ended: tuple[Tensor, Tensor], most: float) -> tuple[Tensor, Tensor, bool]:
    """Return a and b after clipping one module, and whether they are the very ones that were sent."""
    start = ClientStart(pair(*begun), {"m": (0,)}, 1.0, "folded")
    update = ClientUpdate(Client(0, 1, 1), pair(*ended), {"m": (0,)}, {}, 1.0, 1, 0.0)
    found = clip(start, {}, update, most)
    A, B = found.factors["m"]
    return A[0], B[:, 0], found is update


def moved(begun: tuple[Tensor, Tensor], ended: tuple[Tensor, Tensor]) -> float:
    return (torch.outer(ended[1], ended[0]) - torch.outer(begun[1], begun[0])).norm().item()


SIZES = st.sampled_from([0.0, 1e-9, 1e-3, 0.3, 1.0, 7.0, 1e4, 1e12])


@settings(max_examples=200, deadline=None)
@given(st.tuples(SIZES, SIZES, SIZES, SIZES), st.sampled_from([1e-3, 0.5, 20.0]), st.integers(0, 10**6))
def test_no_module_moves_further_than_the_limit(
    sizes: tuple[float, float, float, float], most: float, seed: int
) -> None:
    """Neither at the end nor anywhere on the way; and it moves as far as the bound of the docstring allows."""
    generator = torch.Generator().manual_seed(seed)
    a, b, u, v = (
        size * torch.nn.functional.normalize(torch.randn(width, generator=generator, dtype=torch.float64), dim=0)
        for size, width in zip(sizes, (3, 2, 3, 2), strict=True)
    )
    u, v = (a + u) - a, (b + v) - b  # as they are left by rounding
    new_a, new_b, same = clipped((a, b), (a + u, b + v), most)
    rounding = 1e-9 * (1 + (a.norm() * b.norm()).item())
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        there = a + share * (new_a - a), b + share * (new_b - b)
        assert moved((a, b), there) <= most * (1 + 1e-9) + rounding
    length = a.norm().item()
    reach = max(b.norm().item(), min(length, most / length)) if length > 0 else b.norm().item()
    bound = (reach * u.norm() + a.norm() * v.norm() + u.norm() * v.norm()).item()
    assert same == (bound <= most) or bound == pytest.approx(most)
    if not same and (new_a - a).norm().item() > 1e-9 * length > 0:  # else rounding hides how far it moved
        part = ((new_a - a).norm() / u.norm()).item()
        reached = reach * part * u.norm() + a.norm() * part * v.norm() + part**2 * u.norm() * v.norm()
        assert reached.item() == pytest.approx(most, rel=1e-3)


def test_by_hand() -> None:
    """a = 2 to 6, b = 1 to 1: D(t) = 1 · 4 t, so that M = 1 allows a quarter of the way. And two factors that move."""
    one = torch.tensor
    a, b, same = clipped((one([2.0]), one([1.0])), (one([6.0]), one([1.0])), 1.0)
    assert (a.item(), b.item(), same) == (3.0, 1.0, False)
    # D(t) = t + t + t², which is 1 for t = √2 − 1
    a, b, _ = clipped((one([1.0]), one([1.0])), (one([2.0]), one([2.0])), 1.0)
    assert (a.item(), b.item()) == pytest.approx((2**0.5, 2**0.5))


@pytest.mark.parametrize("factor", [-1.0, 50.0, -50.0, 1e-3])
def test_pairs_of_the_same_product_are_seen(factor: float) -> None:
    """(c a, b / c) has the product of (a, b); the server takes it no further than other changes."""
    a, b = torch.randn(5), torch.randn(4)
    new_a, new_b, same = clipped((a, b), (factor * a, b / factor), 0.1)
    assert not same
    assert ((new_a - a).norm() * b.norm()).item() <= 0.1 + 1e-6
    assert ((new_b - b).norm() * a.norm()).item() <= 0.1 + 1e-6


def test_while_b_is_zero_a_at_most_doubles() -> None:
    a, b = torch.randn(5), torch.zeros(4)
    new_a, _, _ = clipped((a, b), (a + 1e3 * torch.randn(5), b), 0.1)
    assert ((new_a - a).norm() / a.norm()).item() == pytest.approx(1.0, rel=1e-6)


def test_a_rescaled_start_is_clipped_alike() -> None:
    a, b, u, v = torch.randn(5), torch.randn(4), torch.randn(5), torch.randn(4)
    one = clipped((a, b), (a + u, b + v), 0.3)
    other = clipped((8 * a, b / 8), (8 * (a + u), (b + v) / 8), 0.3)
    torch.testing.assert_close((other[0] / 8, other[1] * 8), one[:2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1e30, 1e200])
def test_numbers_of_any_size_are_pulled_back(size: float) -> None:
    a, b = torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    new_a, new_b, _ = clipped((a, b), (a + size, b - size), 1.0)
    assert new_a.isfinite().all()
    assert moved((a, b), (new_a, new_b)) <= 1 + 1e-9


@pytest.mark.parametrize("name", [name for name, method in methods.METHODS.items() if not method.personal])
def test_every_method_s_updates_are_clipped_module_by_module(name: str) -> None:
    """Module 0 of each matrix goes a thousand times as far; the others, and what was held fixed, stay bit for bit."""
    method, server = methods.find(name), make_server(rank=6)
    rank = 6 if method.equal_ranks else 3
    client = Client(1, rank, n_samples=4)
    start = method.start(server, client, ClientRandom(0, 1, 1))
    update, far = make_update(start, client, seed=3), {}
    for matrix, (A, B) in update.factors.items():
        A, B = A.clone(), B.clone()
        if "A" in start.trained:
            A[0] *= 1e6
        if "B" in start.trained:
            B[:, 0] *= 1e6
        far[matrix] = A, B
    found = clip(start, server.head, replace(update, factors=far, head={"head.weight": torch.full((3, 2), 1e9)}), 1e4)
    for matrix, (A, B) in found.factors.items():
        for side, own, like in zip("AB", (A, B), update.factors[matrix], strict=True):
            assert own.dtype == like.dtype
            rows, others = (own, like) if side == "A" else (own.mT, like.mT)
            assert torch.equal(rows[1:], others[1:])
            assert (side in start.trained) != torch.equal(rows[0], others[0])
        chosen = list(start.selected[matrix])
        begun = start.factors[matrix][0][chosen][0].double(), start.factors[matrix][1][:, chosen][:, 0].double()
        assert moved(begun, (A[0].double(), B[:, 0].double())) <= 1e4 * (1 + 1e-4)
    assert (found.head["head.weight"] - server.head["head.weight"]).norm().item() == pytest.approx(1e4, rel=1e-6)


def test_a_pruned_update_is_clipped() -> None:
    start = ClientStart({"m": (torch.ones(2, 1), torch.zeros(1, 2))}, {"m": (0, 1)}, 1.0, "folded")
    update = update_of(0, [[1.0]], [[4.0]], 1.0)
    assert clip(start, {}, update, 1.0).factors["m"][1].tolist() == [[1.0]]


def play(directory: Path, **server: Any) -> tuple[list[dict[str, Any]], list[str]]:
    config, said = make_config(clients={"per_round": 4}, server=server), []
    rows = simulate(config, make_data(), TinyClassifier(), HEAD, directory, None, said.append)
    return rows, said


def test_a_run_says_whom_it_clips_once_a_round(tmp_path: Path) -> None:
    free, said = play(tmp_path / "free")
    assert ([row["clipped"] for row in free], said) == ([[]] * 4, [])
    wide, said = play(tmp_path / "wide", max_update_norm=1e3)
    assert ([row["clipped"] for row in wide], said) == ([[]] * 4, [])
    assert [row["loss"] for row in wide] == [row["loss"] for row in free]
    tight, said = play(tmp_path / "tight", max_update_norm=1e-3)
    assert [row["clipped"] for row in tight] == [[], *[[0, 1, 2, 3]] * 3]
    assert said == [
        f"round {number}: 4 of 4 updates are clipped to server.max_update_norm = 0.001: of client 0, 1, 2, 3"
        for number in (1, 2, 3)
    ]
    assert abs(tight[-1]["loss"] - tight[0]["loss"]) < 0.1 * abs(free[-1]["loss"] - free[0]["loss"])


def test_clients_keep_their_own_heads_unclipped(tmp_path: Path) -> None:
    """A personal head is not sent, so it is the same with any limit."""
    from fed.models.shared_model import adapted
    from fed.simulation.rounds import Federation

    heads = []
    for most in (0.0, 1e-3):
        config = make_config(
            rounds=1, clients={"per_round": 4}, train={"head": "personal"}, server={"max_update_norm": most}
        )
        with adapted(config, TinyClassifier(), HEAD) as shared:
            federation = Federation(config, make_data(), shared, lambda line: None)
            *_, last = federation.play(federation.beginning())
        heads.append([dict(client.head) for client in last.state.clients])
    assert_equal(heads[0], heads[1])


def test_a_method_whose_b_is_not_sent_is_refused() -> None:
    table = {"method": "fedsa-lora", "clients": {"ranks": [16]}, "server": {"max_update_norm": 1.0}}
    with pytest.raises(FedError, match=r"FedSA-LoRA's clients keep B.*it takes 0"):
        parse(table, "here")
