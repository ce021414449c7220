"""Activations computed again in the backward: the same gradients bit for bit, from fewer numbers that are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from fed.training.elementwise import computing_again, observing
from fed.training.memory import SavedTensors
from fed.training.token_losses import counted_positions, token_losses
from tests.support.models import tiny_llama

ROWS, INNER = 5, 7


class GatedMLP(nn.Module):
    """A gated MLP as language models have it."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, INNER), nn.Linear(4, INNER), nn.Linear(INNER, 4)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return out


def gradients(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Any, again: bool) -> tuple[list[Tensor], int]:
    """Return the gradients of Σ y² by x and the parameters, and the number of numbers that the forward kept."""
    x = x.clone().requires_grad_()
    seen: dict[int, int] = {}

    def see(tensor: Tensor) -> None:
        seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // tensor.element_size()

    with observing(see):
        if again:
            with computing_again():
                y = forward(x)
        else:
            y = forward(x)
    found = torch.autograd.grad(y.square().sum(), [x, *parameters])
    return list(found), sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "act",
    [functional.silu, functional.gelu, nn.SiLU(), nn.GELU("tanh"), lambda x: functional.gelu(x, approximate="tanh")],
)
def test_gradients_are_the_same_and_two_of_four_activations_are_kept(
    act: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    mlp, x = GatedMLP(act).to(dtype), torch.randn(ROWS, 4, dtype=dtype)
    plain, kept = gradients(mlp, x, mlp.parameters(), again=False)
    again, fewer = gradients(mlp, x, mlp.parameters(), again=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert kept - fewer == 2 * ROWS * INNER


def test_what_does_not_follow_from_kept_tensors_is_kept() -> None:
    fixed = torch.arange(12.0).view(3, 4)
    weight = torch.ones(4, 4, requires_grad=True)
    for forward in (
        lambda x: (x * fixed) @ weight,  # the product keeps `fixed` alone, so x would have to be kept instead
        lambda x: (x * x[:1]) @ weight,  # of another shape
        lambda x: (x * 2.0) @ weight,
        lambda x: (x + x) @ weight,
        lambda x: functional.silu(x * 1, inplace=True) @ weight,  # what it was computed from is gone
    ):
        plain, kept = gradients(forward, torch.randn(3, 4), [weight], again=False)
        again, fewer = gradients(forward, torch.randn(3, 4), [weight], again=True)
        assert kept == fewer
        assert len(plain) == len(again)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, w: (functional.silu(x).view(2, 6) * x.view(2, 6)).view(3, 4) @ w,
        lambda x, w: ((x * x).view(2, 6) * x.view(2, 6)).view(3, 4) @ w,
        lambda x, w: functional.gelu(input=x) @ w,
        lambda x, w: (torch._neg_view(x * x) * x) @ w,
        lambda x, w: functional.silu(functional.silu(functional.silu(x) * x) * x) @ w,
    ],
)
def test_views_and_chains_have_the_same_gradients(forward: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, weight = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    plain, _ = gradients(lambda x: forward(x, weight), x, [weight], again=False)
    again, _ = gradients(lambda x: forward(x, weight), x, [weight], again=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_other_tensors_that_are_kept_may_not_change_in_place_either() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with computing_again():
        y = x.exp()
        total = y.sum()
        y.detach().mul_(2.0)
    with pytest.raises(
        RuntimeError, match=r"\(3, 4\) that the backward needs was changed in place: it is at version 1"
    ):
        total.backward()


def test_a_result_that_was_changed_after_it_was_noted_is_kept() -> None:
    weight = torch.ones(4, 4, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return functional.silu(x).mul_(3.0) @ weight

    x = torch.randn(3, 4)
    (plain, of_weight), kept = gradients(forward, x, [weight], again=False)
    (again, of_weight_again), fewer = gradients(forward, x, [weight], again=True)
    assert torch.equal(plain, again)
    assert torch.equal(of_weight, of_weight_again)
    assert kept == fewer


def test_an_input_changed_in_place_is_an_error_as_in_plain_autograd() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    for again in (False, True):
        z = x * 1
        if again:
            with computing_again():
                y = functional.silu(z) @ weight
        else:
            y = functional.silu(z) @ weight
        with torch.no_grad():
            z.add_(1.0)
        with pytest.raises(RuntimeError, match=r"version (1|2)"):
            y.sum().backward()


def test_a_storage_that_is_used_again_is_not_taken_for_what_it_held() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(12)]

    def forward(x: Tensor) -> Tensor:
        for weight in weights:  # more activations than are noted, each freed before the next is made
            with torch.no_grad():
                functional.silu(x)
            x = functional.silu(x) @ weight
        return x

    x = torch.randn(16, 64)
    plain, _ = gradients(forward, x, weights, again=False)
    again, _ = gradients(forward, x, weights, again=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_nothing_is_held_after_the_forward_but_what_the_graph_keeps() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    with computing_again():
        z = functional.silu(x)
        held = StorageWeakRef(z.untyped_storage())
        y = z @ weight
        del z
        assert not held.expired()
    assert held.expired()
    y.sum().backward()


def test_a_language_model_keeps_fewer_numbers_for_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tiny_llama()
    layers, inner = model.config.num_hidden_layers, model.config.intermediate_size
    tokens = torch.randint(1, model.config.vocab_size, (2, 6))
    labels = tokens.clone()

    def step() -> tuple[list[Tensor], int]:
        saved = SavedTensors(model)
        with saved.watching(True):
            losses = token_losses(model, {"input_ids": tokens}, labels, counted_positions(labels))
        return list(torch.autograd.grad(losses.sum(), [*model.model.parameters()])), saved.size_bytes

    again, fewer = step()
    monkeypatch.setattr("fed.training.elementwise.NOTED", 0)
    monkeypatch.setattr("fed.training.elementwise.ACTIVATIONS", set())
    monkeypatch.setattr("fed.training.elementwise.PRODUCTS", set())
    plain, kept = step()
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert kept - fewer == 2 * layers * tokens.numel() * inner * 4
