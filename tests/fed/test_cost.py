"""Bytes up and down, counted by hand."""

from __future__ import annotations

import torch

from fed.cost import download_bytes, upload_bytes
from fed.types import Client, ClientStart, ClientUpdate

R, K, N = 4, 7, 5


def make_start(dtype: torch.dtype, selected: tuple[int, ...]) -> ClientStart:
    factors = {"m": (torch.zeros(R, K, dtype=dtype), torch.zeros(N, R, dtype=dtype))}
    return ClientStart(factors, {"m": selected}, 1.0, "folded")


def send(start: ClientStart, head: dict[str, torch.Tensor]) -> ClientUpdate:
    A, B = start.factors["m"]
    chosen = list(start.selected["m"])
    return ClientUpdate(Client(0, len(chosen), 1), {"m": (A[chosen], B[:, chosen])}, start.selected, head, 1.0, 1, 0.0)


def test_down_go_all_modules_and_the_head() -> None:
    head = {"w": torch.zeros(3, 5), "b": torch.zeros(3)}
    # 4 modules × (7 + 5) × 4 bytes = 192; head 18 × 4 = 72.
    assert download_bytes(make_start(torch.float32, (0, 2)), head) == 192 + 72


def test_up_go_the_trained_modules_their_indices_and_the_head() -> None:
    start = make_start(torch.float32, (0, 2, 3))
    # 3 modules × 12 × 4 bytes = 144; 3 indices × 2 bytes = 6; head 3 × 4 = 12.
    assert upload_bytes(start, send(start, {"b": torch.zeros(3)})) == 144 + 6 + 12


def test_a_frozen_head_costs_nothing() -> None:
    start = make_start(torch.float32, (1,))
    assert download_bytes(start, {}) == 192
    assert upload_bytes(start, send(start, {})) == 48 + 2


def test_whoever_trained_everything_sends_no_indices() -> None:
    start = make_start(torch.float32, (0, 1, 2, 3))
    assert upload_bytes(start, send(start, {})) == 192


def test_half_precision_is_half_the_payload() -> None:
    start = make_start(torch.bfloat16, (1, 2))
    assert download_bytes(start, {}) == 96
    assert upload_bytes(start, send(start, {})) == 48 + 4
