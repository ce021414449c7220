"""Clients' parameters in one tensor: each client's are clipped and updated as torch would by themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fed.errors import FedError
from fed.training.stacked_optimizer import Piece, Stacked, StackedOptimizer

CLIENTS = 4
SHAPES = {"A/q": (3, 5), "B/q": (6, 3), "head/bias": (2,)}


def stacks(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(CLIENTS, *shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }


def settings(**changes: Any) -> Any:
    return SimpleNamespace(**{"optimizer": "adamw", "weight_decay": 0.1, "momentum": 0.9} | changes)


@pytest.mark.parametrize("columns", [(), ("A/q",)], ids=["rows", "columns"])
def test_every_tensor_is_where_it_says(columns: tuple[str, ...]) -> None:
    given = stacks()
    stacked = Stacked(given, columns)
    named = stacked.named(stacked.values)
    assert all(torch.equal(named[name], tensor) for name, tensor in given.items())
    assert len(stacked.values) == sum(tensor.numel() for tensor in given.values())
    assert named["A/q"].is_contiguous() is not bool(columns)
    leaves = stacked.leaves(2)
    assert all(leaf.is_leaf and leaf.requires_grad and len(leaf) == 2 for leaf in leaves.values())
    assert leaves["B/q"].data_ptr() == named["B/q"].data_ptr()


def test_pieces_by_hand() -> None:
    stacked = Stacked(stacks())
    assert stacked.pieces(4, [0.1] * 4) == [Piece(0, 4 * 35, 0.1)]
    assert stacked.pieces(2, [0.1] * 4) == [Piece(0, 30, 0.1), Piece(60, 96, 0.1), Piece(132, 136, 0.1)]
    assert stacked.pieces(3, [0.1, 0.2, 0.2, 0.1])[:3] == [Piece(0, 15, 0.1), Piece(15, 45, 0.2), Piece(60, 78, 0.1)]


@pytest.mark.parametrize("columns", [(), ("A/q",)], ids=["rows", "columns"])
def test_clients_are_clipped_as_torch_clips_them(columns: tuple[str, ...]) -> None:
    gradients = stacks(1)
    for gradient in gradients.values():
        gradient[2] *= 1e-3
    stacked = Stacked(stacks(), columns)
    for name, place in stacked.named(stacked.gradients).items():
        place.copy_(gradients[name])
    stacked.clip_(3, 1.0)
    for client in range(CLIENTS):
        own = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES.values()]
        for parameter, gradient in zip(own, gradients.values(), strict=True):
            parameter.grad = gradient[client].clone()
        if client < 3:
            nn.utils.clip_grad_norm_(own, 1.0)
        for parameter, place in zip(own, stacked.named(stacked.gradients).values(), strict=True):
            torch.testing.assert_close(place[client], parameter.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rates", [[0.1] * 4, [0.1, 0.2, 0.2, 0.1]], ids=["one rate", "two rates"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_clients_that_leave_one_by_one_move_as_they_would_alone(
    optimizer: str, masked: bool, rates: list[float]
) -> None:
    """Client 3 takes two steps, client 2 three, the others five; with a mask each trains one module of q less."""
    start, steps = stacks(), [5, 5, 3, 2]
    stacked = Stacked(start, ["A/q"])
    trained = None
    if masked:
        trained = torch.ones_like(stacked.values, dtype=torch.bool)
        for client in range(CLIENTS):
            places = stacked.named(trained)
            places["A/q"][client, client % 3] = False
            places["B/q"][client, :, client % 3] = False
    together = StackedOptimizer(stacked, settings(optimizer=optimizer), rates, trained)
    alone = [{name: nn.Parameter(tensor[client].clone()) for name, tensor in start.items()} for client in range(4)]
    kinds: dict[str, Any] = {
        "adamw": lambda own, rate: torch.optim.AdamW(own, lr=rate, weight_decay=0.1),
        "sgd": lambda own, rate: torch.optim.SGD(own, lr=rate, momentum=0.9, weight_decay=0.1),
    }
    each = [kinds[optimizer](own.values(), rate) for own, rate in zip(alone, rates, strict=True)]
    for step in range(5):
        count, gradients = sum(step < own for own in steps), stacks(10 + step)
        if trained is not None:
            for name, mask in stacked.named(trained).items():
                gradients[name] *= mask
        for name, place in stacked.named(stacked.gradients).items():
            place.copy_(gradients[name])
        together.step(count)
        for client in range(count):
            for name, parameter in alone[client].items():
                parameter.grad = gradients[name][client].clone()
            each[client].step()
    for name, own in stacked.named(stacked.values).items():
        for client in range(CLIENTS):
            found, expected = own[client], alone[client][name].detach()
            if trained is not None:  # in torch weight decay would also change modules that are not trained
                mask = stacked.named(trained)[name][client]
                expected = torch.where(mask, expected, start[name][client])
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, msg=f"{name} of client {client}")


def test_tensors_of_two_kinds_are_refused() -> None:
    tensors = stacks()
    tensors["head/bias"] = tensors["head/bias"].float()
    with pytest.raises(FedError, match="a cohort needs them of one dtype"):
        Stacked(tensors)
