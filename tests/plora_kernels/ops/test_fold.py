"""`fold_` in place: folding, unfolding, and autograd."""

from __future__ import annotations

import pytest
import torch

import plora_kernels as pk
from plora_kernels import reference
from tests.support.layer_inputs import layer_inputs as inputs


def test_fold_adds_the_unselected_and_takes_them_out_again(each_backend: str) -> None:
    _, weight, lora_A, lora_B, _ = inputs(requires_grad=False)
    mask = torch.tensor([True, False, True, False])
    folded = weight.clone()
    assert pk.fold_(folded, lora_A, lora_B, mask, scale=0.5) is folded
    torch.testing.assert_close(folded, reference.fold(weight, lora_A, lora_B, mask, scale=0.5))
    pk.fold_(folded, lora_A, lora_B, [0, 2], scale=0.5, sign=-1)
    torch.testing.assert_close(folded, weight)
    assert torch.equal(pk.fold_(weight.clone(), lora_A, lora_B, None), weight)
    assert torch.equal(pk.fold_(weight.clone(), lora_A, lora_B, range(4)), weight)


def test_fold_counts_as_a_change_for_autograd() -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    before = weight._version
    y = pk.plora_linear(x, weight, lora_A, lora_B)
    pk.fold_(weight, lora_A, lora_B, [])
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fold_refuses_a_weight_that_trains() -> None:
    _, weight, lora_A, lora_B, _ = inputs()
    weight.requires_grad_()
    with pytest.raises(pk.StateError, match="weight requires a gradient"):
        pk.fold_(weight, lora_A, lora_B, [])
    with torch.no_grad():
        pk.fold_(weight, lora_A, lora_B, [])


@pytest.mark.parametrize("mask", [[False] * 4, [False, True, False, False]], ids=["none", "one"])
def test_a_tensor_that_stands_for_its_negative_is_folded_into_as_one(mask: list[bool], each_backend: str) -> None:
    _, weight, lora_A, lora_B, _ = inputs(requires_grad=False)
    selected = torch.tensor(mask)
    expected = reference.fold(weight, lora_A, lora_B, selected, scale=0.5)

    def negative(tensor: torch.Tensor) -> torch.Tensor:
        found = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        assert found.is_neg()
        return found

    before = weight.clone()
    outs = [negative(torch.zeros_like(weight)) for _ in range(3)]
    in_place = negative(weight)
    version = in_place._version
    assert pk.fold_(in_place, lora_A, lora_B, selected, scale=0.5) is in_place
    assert in_place._version > version
    assert pk.fold(weight, lora_A, lora_B, selected, scale=0.5, out=outs[0]) is outs[0]
    pk.fold_many_([pk.Fold(weight, lora_A, lora_B, selected, 0.5, out=out) for out in outs[1:]])
    from_negative = pk.fold(negative(weight), negative(lora_A), negative(lora_B), selected, scale=0.5)
    for found in (in_place, *outs, from_negative):
        torch.testing.assert_close(found, expected)
    assert torch.equal(weight, before)
