"""The reference on cases computed by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plora_kernels as pk
from plora_kernels import reference

# x = [1, 2], W = [[1, 0], [0, 1], [1, 1]], a_0 = [1, 1], a_1 = [0, 2], b_0 = [1, 0, 2], b_1 = [0, 1, 1]
X = torch.tensor([[1.0, 2.0]])
W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
A = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
FIRST = torch.tensor([True, False])


def test_forward_by_hand() -> None:
    # x Wᵀ = [1, 2, 3]; x Aᵀ = [3, 4]; b_0·3 = [3, 0, 6]; b_1·4 = [0, 4, 4]; s = ½
    assert reference.forward(X, W, A, B, scale=0.5).tolist() == [[2.5, 4.0, 8.0]]
    assert reference.forward(X, W, A, B, FIRST, scale=0.5).tolist() == [[2.5, 2.0, 6.0]]
    assert reference.forward(X, W, A, B, FIRST, scale=0.5, unselected="frozen").tolist() == [[2.5, 4.0, 8.0]]
    bias = torch.tensor([10.0, 20.0, 30.0])
    assert reference.forward(X, W, A, B, ~FIRST & FIRST, bias=bias).tolist() == [[11.0, 22.0, 33.0]]


def test_gradients_by_hand() -> None:
    dy = torch.tensor([[1.0, 0.0, 1.0]])
    # dY W = [2, 1]; dY B = [3, 1]; 3·a_0 = [3, 3]; 1·a_1 = [0, 2]; s = 2
    dx, d_A, d_B, d_bias = reference.gradients(dy, X, W, A, B, FIRST, scale=2.0)
    assert dx.tolist() == [[8.0, 7.0]]
    assert d_A.tolist() == [[6.0, 12.0], [0.0, 0.0]]  # s·3·x, nothing for module 1
    assert d_B.tolist() == [[6.0, 0.0], [0.0, 0.0], [6.0, 0.0]]  # s·dyᵀ·3
    assert d_bias.tolist() == [1.0, 0.0, 1.0]
    dx_frozen, d_A_frozen, d_B_frozen, _ = reference.gradients(dy, X, W, A, B, FIRST, scale=2.0, unselected="frozen")
    assert dx_frozen.tolist() == [[8.0, 11.0]]
    assert torch.equal(d_A_frozen, d_A)
    assert torch.equal(d_B_frozen, d_B)


def test_fold_by_hand() -> None:
    # b_1 a_1ᵀ = [[0, 0], [0, 2], [0, 2]]
    assert reference.fold(W, A, B, FIRST, scale=0.5).tolist() == [[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]]
    assert reference.fold(W, A, B, FIRST, scale=0.5, sign=-1).tolist() == [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]


def test_gradients_are_what_autograd_says() -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    x, a, b, bias = draw(3, 2, 7), draw(5, 7), draw(4, 5), draw(4)
    w, dy = torch.randn(4, 7, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False])
    reference.forward(x, w, a, b, mask, bias=bias, scale=0.3).backward(dy)
    for name, mine, autograd in zip(
        ("dx", "dA", "dB", "dbias"),
        reference.gradients(dy, x.detach(), w, a.detach(), b.detach(), mask, scale=0.3),
        (x.grad, a.grad, b.grad, bias.grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, autograd, msg=name)


def test_folding_and_freezing_are_the_same_function() -> None:
    x, w, a, b = (torch.randn(s, dtype=torch.float64) for s in ((6, 9), (5, 9), (7, 9), (5, 7)))
    mask = torch.tensor([True, False, False, True, True, False, True])
    folded = reference.forward(x, reference.fold(w, a, b, mask, scale=0.7), a, b, mask, scale=0.7)
    frozen = reference.forward(x, w, a, b, mask, scale=0.7, unselected="frozen")
    torch.testing.assert_close(folded, frozen)


def test_module_average_by_hand() -> None:
    previous = (torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([[5.0, 6.0, 7.0]]))
    first = (torch.tensor([[2.0], [20.0]]), torch.tensor([[1.0, 2.0]]), [0, 1])
    second = (torch.tensor([[6.0]]), torch.tensor([[9.0]]), [0])
    # module 0: (2 + 6)/2 and (1 + 9)/2; module 1: the first client alone; module 2: nobody
    lora_A, lora_B = pk.module_average(previous, [first, second])
    assert lora_A.flatten().tolist() == [4.0, 20.0, 100.0]
    assert lora_B.flatten().tolist() == [5.0, 2.0, 7.0]
    # weights 1 and 3: module 0: (2 + 18)/4 and (1 + 27)/4
    lora_A, lora_B = pk.module_average(previous, [first, second], weights=[1.0, 3.0])
    assert lora_A.flatten().tolist() == [5.0, 20.0, 100.0]
    assert lora_B.flatten().tolist() == [7.0, 2.0, 7.0]


def test_module_average_without_updates_keeps_everything_bit_for_bit() -> None:
    previous = (torch.randn(4, 3), torch.randn(5, 4))
    lora_A, lora_B = pk.module_average(previous, [])
    assert torch.equal(lora_A, previous[0])
    assert torch.equal(lora_B, previous[1])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_module_average_does_not_depend_on_the_order_of_clients(data: st.DataObject) -> None:
    rank, clients = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    updates = []
    for _ in range(clients):
        indices = sorted(data.draw(st.sets(st.integers(0, rank - 1), max_size=rank)))
        updates.append((torch.randn(len(indices), 3), torch.randn(2, len(indices)), indices))
    weights = [float(w) for w in torch.rand(clients) + 0.1]
    order = data.draw(st.permutations(range(clients)))
    previous = (torch.randn(rank, 3), torch.randn(2, rank))
    straight = pk.module_average(previous, updates, weights)
    shuffled = pk.module_average(previous, [updates[i] for i in order], [weights[i] for i in order])
    torch.testing.assert_close(straight, shuffled, rtol=1e-6, atol=1e-7)


def test_module_average_refuses_updates_that_do_not_fit() -> None:
    previous = (torch.zeros(3, 2), torch.zeros(4, 3))
    with pytest.raises(pk.ShapeError, match=r"update 0 holds A \(1, 2\) and B \(4, 2\); its 2 indices need"):
        pk.module_average(previous, [(torch.zeros(1, 2), torch.zeros(4, 2), [0, 1])])
    for wrong in ([0, 3], [1, 1], [-1, 0]):
        with pytest.raises(pk.SelectionError):
            pk.module_average(previous, [(torch.zeros(2, 2), torch.zeros(4, 2), wrong)])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(pk.ConfigError, match=r"weight 0 is .*; a positive finite number"):
            pk.module_average(previous, [(torch.zeros(1, 2), torch.zeros(4, 1), [0])], weights=[weight])
    with pytest.raises(pk.ShapeError, match="1 weights for 0 updates"):
        pk.module_average(previous, [], weights=[1.0])
