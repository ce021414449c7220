"""`FusedPLoRALinear`: selection, folding without drift, optimisers, state dicts."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import nn

import plora_kernels as pk
from plora_kernels import reference
from tests.support.equality import assert_equal


def make(
    rank: int = 6, bias: bool = True, dtype: torch.dtype = torch.float32, **options: object
) -> pk.FusedPLoRALinear:
    """Return a layer (7 → 5) without a zero module."""
    layer = pk.FusedPLoRALinear(7, 5, rank=rank, alpha=3.0, bias=bias, dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def test_from_linear_starts_as_the_linear_and_shares_its_weight() -> None:
    linear = nn.Linear(7, 5).eval()
    x = torch.randn(2, 3, 7)
    expected = linear(x)
    layer = pk.FusedPLoRALinear.from_linear(linear, rank=4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.training
    torch.testing.assert_close(layer(x), expected)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.scale == 32.0 / 4
    assert pk.FusedPLoRALinear.from_linear(nn.Linear(7, 5), rank=4, rank_stabilized=True).scale == 32.0 / 2


@pytest.mark.parametrize("form", ["folded", "frozen"])
@pytest.mark.parametrize("chosen", [[], [2], [0, 3, 5], range(6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_selecting_does_not_change_what_the_layer_computes(form: str, chosen: list[int], bias: bool) -> None:
    layer = make(bias=bias)
    x = torch.randn(4, 7)
    before = layer(x)
    layer.select(chosen, form)
    torch.testing.assert_close(layer(x), before)
    assert layer.selected == tuple(chosen)
    assert layer.lora_A.shape == (len(chosen), 7)
    assert layer.lora_B.shape == (5, len(chosen))
    layer.unfold()
    assert layer.selected is None
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_gradients_of_the_compact_parameters(form: str) -> None:
    layer = make()
    weight, (lora_A, lora_B) = layer.weight.detach().clone(), layer.factors()
    mask = torch.tensor([False, True, True, False, False, True])
    x, dy = torch.randn(4, 7, requires_grad=True), torch.randn(4, 5)
    layer.select(mask, form)
    layer(x).backward(dy)
    d_x, d_A, d_B, _ = reference.gradients(
        dy, x.detach(), weight, lora_A, lora_B, mask, scale=layer.scale, unselected="frozen"
    )
    torch.testing.assert_close(layer.lora_A.grad, d_A[mask])
    torch.testing.assert_close(layer.lora_B.grad, d_B[:, mask])
    torch.testing.assert_close(x.grad, d_x)


@pytest.mark.parametrize("form", ["folded", "frozen"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_unselected_modules_do_not_move_under_weight_decay_and_momentum(form: str, optimizer: str) -> None:
    layer = make()
    weight, (lora_A, lora_B) = layer.weight.detach().clone(), layer.factors()
    layer.select([1, 4], form)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(2, 7), (5, 2)]
    if optimizer == "adamw":
        steps: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    else:
        steps = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(5):
        steps.zero_grad()
        layer(torch.randn(4, 7)).square().sum().backward()
        steps.step()
    layer.unfold()
    others = [0, 2, 3, 5]
    assert torch.equal(layer.lora_A[others], lora_A[others])
    assert torch.equal(layer.lora_B[:, others], lora_B[:, others])
    assert not torch.equal(layer.lora_A[[1, 4]], lora_A[[1, 4]])
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("original", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_selections_leave_the_base_bit_identical(dtype: torch.dtype, original: str) -> None:
    layer = make(dtype=dtype, original=original)
    weight = layer.weight.detach().clone()
    source = random.Random(0)
    for cycle in range(1000):
        layer.select(source.sample(range(6), source.randrange(7)))
        if cycle % 3:  # one time in three, select again without unfolding first
            layer.unfold()
    layer.unfold()
    assert torch.equal(layer.weight, weight)
    assert layer.original_weight is None


@pytest.mark.parametrize("original", ["device", "host"])
def test_folding_keeps_the_parameter_and_unfolding_gives_its_memory_back(original: str) -> None:
    layer = make(original=original)
    weight, home = layer.weight, layer.weight.data_ptr()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(3, 7, requires_grad=True)
    y = layer(x)
    for selected in ([1], [0, 2], []):
        layer.select(selected)
        assert layer.weight is weight
        assert any(parameter is weight for parameter in optimizer.param_groups[0]["params"])
        kept = layer._original()
        # The original is kept once: on the device the tensor itself, on the host a copy.
        assert (layer.original_weight is not None) == (original == "device")
        assert (kept.data_ptr() == home) == (original == "device")
        assert (layer.weight.data_ptr() == home) == (original == "host")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()  # the graph saved the weight before it was folded
    layer.unfold()
    assert layer.weight is weight
    assert layer.weight.data_ptr() == home


def test_state_dict_is_full_and_unfolded_whatever_stands() -> None:
    layer = make()
    expected = {name: value.clone() for name, value in layer.state_dict().items()}
    assert list(expected) == ["weight", "bias", "lora_A", "lora_B"]
    for form in ("folded", "frozen"):
        layer.select([1, 4], form)
        emitted = layer.state_dict()
        assert list(emitted) == list(expected)
        assert_equal(emitted, expected)
    with torch.no_grad():
        layer.lora_A.add_(1.0)
    assert torch.equal(layer.state_dict()["lora_A"][[1, 4]], expected["lora_A"][[1, 4]] + 1.0)


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_loading_a_state_dict_while_selected_keeps_the_selection_and_the_parameters(form: str) -> None:
    source, layer = make(), make()
    x = torch.randn(3, 7)
    layer.select([0, 2, 3], form)
    held = layer.lora_A
    layer.load_state_dict(source.state_dict())
    assert layer.lora_A is held
    assert layer.selected == (0, 2, 3)
    torch.testing.assert_close(layer(x), source(x))
    layer.unfold()
    assert_equal(layer.state_dict(), source.state_dict())


def test_copies_and_moves_keep_a_selection() -> None:
    layer = make()
    layer.select([0, 2])
    x = torch.randn(3, 7)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))
    double = copy.deepcopy(layer).double()
    torch.testing.assert_close(double(x.double()), layer(x).double())
    double.unfold()
    layer.unfold()
    assert torch.equal(double.weight, layer.weight.double())


def test_runs_without_storage() -> None:
    layer = pk.FusedPLoRALinear(7, 5, device="meta")
    y = layer(torch.empty(2, 3, 7, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == (2, 3, 5)


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_trained_parameters_may_be_cast(form: str) -> None:
    # As a caller may do who asked for adapters in half precision.
    layer = make(dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    layer.select([0, 2], form)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    x = torch.randn(3, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    assert layer.lora_A.grad.dtype is torch.float32
    assert layer.state_dict()["lora_A"].dtype is torch.bfloat16
    layer.unfold()
    assert layer.lora_A.dtype is torch.bfloat16


def test_a_write_of_equal_values_is_no_change() -> None:
    layer = make()
    original = layer.weight.detach().clone()
    layer.select([1])
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clone())  # as DistributedDataParallel's broadcast does
    layer.unfold()
    assert torch.equal(layer.weight, original)


def test_selecting_inside_inference_mode_leaves_parameters_that_train() -> None:
    layer = make()
    with torch.inference_mode():
        layer.select([1, 3])
        layer(torch.randn(2, 7))
    layer(torch.randn(2, 7)).sum().backward()
    assert layer.lora_A.grad is not None
    layer.unfold()


def test_a_trainable_weight_is_refused_rather_than_left_without_a_gradient() -> None:
    layer = make()
    layer.select([1], "frozen")
    layer.weight.requires_grad_(True)
    with pytest.raises(pk.StateError, match="the base is frozen"):
        layer(torch.randn(2, 7))


def test_merge_holds_every_module_and_leaves_the_layer_alone() -> None:
    layer, x = make(), torch.randn(3, 7)
    expected = layer(x)
    for selection in (None, [1, 2]):
        if selection is not None:
            layer.select(selection)
        merged = layer.merge()
        assert type(merged) is nn.Linear
        torch.testing.assert_close(merged(x), expected)
    torch.testing.assert_close(layer(x), expected)
    assert layer.selected == (1, 2)


def test_extra_repr_says_what_stands() -> None:
    layer = make()
    assert "rank=6, scale=0.5" in repr(layer)
    assert "selected" not in repr(layer)
    layer.select([4, 1], "frozen")
    assert "selected=[1, 4], unselected='frozen'" in repr(layer)


def test_set_factors_round_trips() -> None:
    layer = make()
    lora_A, lora_B = torch.randn(6, 7), torch.randn(5, 6)
    layer.set_factors(lora_A, lora_B)
    for mine, given in zip(layer.factors(), (lora_A, lora_B), strict=True):
        assert torch.equal(mine, given)
        assert mine is not given


def test_what_cannot_be_folded_is_refused_and_nothing_changes() -> None:
    layer = make()
    layer.weight.requires_grad_(True)
    with pytest.raises(pk.StateError, match="requires a gradient and cannot be folded"):
        layer.select([1])
    layer.weight.requires_grad_(False)
    layer.weight_is_tied = True
    with pytest.raises(pk.StateError, match="shared with another module"):
        layer.select([1])
    assert layer.selected is None
    layer.select([1], "frozen")


def test_a_weight_changed_while_folded_is_not_silently_undone() -> None:
    layer = make()
    layer.select([1])
    with torch.no_grad():
        layer.weight.add_(1.0)
    for act in (layer.unfold, lambda: layer.select([2])):
        with pytest.raises(pk.StateError, match="weight was changed while modules were folded"):
            act()
    state = make().state_dict()
    layer.load_state_dict(state)  # the loaded weight replaces the changed one
    layer.unfold()
    assert torch.equal(layer.weight, state["weight"])


def test_bad_arguments_are_named() -> None:
    linear = nn.Linear(7, 5)
    for rank in (0, 257, 2.0, True):
        with pytest.raises(pk.RankError, match=f"rank is {rank!r}; an integer from 1 to 256"):
            pk.FusedPLoRALinear.from_linear(linear, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(pk.ConfigError, match="alpha is 0"):
        pk.FusedPLoRALinear.from_linear(linear, alpha=0)
    with pytest.raises(pk.ConfigError, match="original is 'disk'; it may be 'device' or 'host'"):
        pk.FusedPLoRALinear.from_linear(linear, original="disk")
    with pytest.raises(pk.ConfigError, match=r"dropout is 1\.5; a probability from 0 to below 1"):
        pk.FusedPLoRALinear.from_linear(linear, dropout=1.5)
    with pytest.raises(pk.TargetError, match=r"from_linear got a Conv2d; only a plain nn\.Linear can be replaced"):
        pk.FusedPLoRALinear.from_linear(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]
    assert linear.weight.requires_grad  # a refusal leaves the linear as it was
    layer = make()
    for selection, form in (([], "folded"), ([1], "folded"), ([1], "frozen")):
        layer.select(selection, form)
        with pytest.raises(pk.ShapeError, match=r"x is \(2, 6\); weight \(N=5, K=7\) needs"):
            layer(torch.randn(2, 6))
    layer.unfold()
    with pytest.raises(pk.SelectionError, match="selected holds module 6; rank 6 has modules 0 to 5"):
        layer.select([6])
    with pytest.raises(pk.ConfigError, match="unselected is 'gone'"):
        layer.select([1], "gone")
    layer.select([1])
    with pytest.raises(pk.StateError, match=r"cannot set the factors while modules \[1\] are selected"):
        layer.set_factors(torch.zeros(6, 7), torch.zeros(5, 6))
    layer.unfold()
    with pytest.raises(pk.ShapeError, match=r"lora_B is \(6, 5\); the layer needs \(5, 6\)"):
        layer.set_factors(torch.zeros(6, 7), torch.zeros(6, 5))
