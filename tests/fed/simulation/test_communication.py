"""Bytes up and down, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fed.simulation.communication import download_bytes, stack_bytes, upload_bytes
from fed.types import Adapter, Client, ClientStart, ClientUpdate, ServerState, Stack

R, K, N = 4, 7, 5


def make_start(dtype: torch.dtype, selected: tuple[int, ...]) -> ClientStart:
    factors = {"m": (torch.zeros(R, K, dtype=dtype), torch.zeros(N, R, dtype=dtype))}
    return ClientStart(factors, {"m": selected}, 1.0, "folded")


def send(start: ClientStart, head: dict[str, torch.Tensor]) -> ClientUpdate:
    A, B = start.factors["m"]
    chosen = list(start.selected["m"])
    return ClientUpdate(Client(0, len(chosen), 1), {"m": (A[chosen], B[:, chosen])}, start.selected, head, 1.0, 1, 0.0)


@pytest.mark.parametrize(
    ("dtype", "selected", "head", "down", "up"),
    [
        # Down: all 4 modules × (7 + 5) × 4 bytes. Up: the trained ones, 2 bytes for the index of each, and the head.
        (torch.float32, (0, 2), {"w": torch.zeros(3, 5), "b": torch.zeros(3)}, 192 + 72, 96 + 4 + 72),
        (torch.float32, (0, 2, 3), {"b": torch.zeros(3)}, 192 + 12, 144 + 6 + 12),
        (torch.float32, (1,), {}, 192, 48 + 2),  # a frozen head costs nothing
        (torch.float32, (0, 1, 2, 3), {}, 192, 192),  # a client that trained all modules sends no indices
        (torch.bfloat16, (1, 2), {}, 96, 48 + 4),
    ],
    ids=["a head", "part of a head", "no head", "everything", "half precision"],
)
def test_bytes_of_modules_indices_and_head(
    dtype: torch.dtype, selected: tuple[int, ...], head: dict[str, torch.Tensor], down: int, up: int
) -> None:
    start = make_start(dtype, selected)
    assert (download_bytes(start, head), upload_bytes(start, send(start, head))) == (down, up)


@pytest.mark.parametrize(
    ("sides", "down", "up"), [("A", 4 * 7 * 4, 3 * 7 * 4), ("B", 4 * 5 * 4, 3 * 5 * 4), ("", 0, 0)]
)
def test_of_factors_that_do_not_travel_nothing_counts(sides: str, down: int, up: int) -> None:
    start = make_start(torch.float32, (0, 2, 3))
    assert download_bytes(replace(start, received=sides), {}) == down
    assert upload_bytes(start, replace(send(start, {}), sent=sides)) == up + 3 * 2


def test_a_personal_head_is_not_sent() -> None:
    start = make_start(torch.float32, (0, 1, 2, 3))
    assert upload_bytes(start, send(start, {"w": torch.zeros(3, 5)}), with_head=False) == 192


def test_pruned_modules_need_no_indices() -> None:
    start = make_start(torch.float32, (0, 1, 2, 3))
    assert upload_bytes(start, send(replace(start, selected={"m": (0, 1)}), {})) == 2 * 12 * 4


def test_a_stack_counts_its_modules_and_a_weight_for_each() -> None:
    stack = Stack(torch.zeros(6, K), torch.zeros(N, 6), torch.zeros(6, dtype=torch.float64))
    assert stack_bytes({"m": stack, "n": stack}) == 2 * (6 * 12 * 4 + 6 * 8)


@pytest.mark.parametrize(("last_round", "missed"), [(0, 111), (1, 111), (2, 110), (3, 100)])
def test_whoever_missed_rounds_catches_up(last_round: int, missed: int) -> None:
    """Folds of rounds 1, 2, 3 take 1, 10, 100 bytes. A participant of round 2 got that of round 1 at its start."""
    server = ServerState(Adapter({}, 1.0), round=3, fold_bytes=(1, 10, 100))
    start, client = make_start(torch.float32, (0, 1)), Client(0, 2, 1, last_round=last_round)
    assert download_bytes(start, {}, server, client) == 192 + missed
