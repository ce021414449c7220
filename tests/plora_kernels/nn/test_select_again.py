"""Selecting more than once: which parameter objects stay, and what happens to those who hold one that does not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import plora_kernels as pk

RANK = 6


def make(**options: object) -> pk.FusedPLoRALinear:
    """Return a layer (7 → 5) of six modules, none of which is zero."""
    layer = pk.FusedPLoRALinear(7, 5, rank=RANK, alpha=3.0, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def step(layer: pk.FusedPLoRALinear, optimizer: torch.optim.Optimizer) -> None:
    """Train the layer for one step."""
    optimizer.zero_grad()
    layer(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_an_optimizer_trains_the_new_modules_of_a_selection_of_the_same_size(form: str) -> None:
    layer = make()
    layer.select([0, 1], form)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    step(layer, optimizer)
    before = layer.factors()
    layer.select([2, 5], form)
    assert layer.lora_A.grad is None
    assert torch.equal(layer.lora_A, before[0][[2, 5]])
    assert torch.equal(layer.lora_B, before[1][:, [2, 5]])
    step(layer, optimizer)
    layer.unfold()
    others = [0, 1, 3, 4]
    assert torch.equal(layer.lora_A[others], before[0][others])
    assert torch.equal(layer.lora_B[:, others], before[1][:, others])
    for j in (2, 5):
        assert not torch.equal(layer.lora_A[j], before[0][j])
        assert not torch.equal(layer.lora_B[:, j], before[1][:, j])


def test_the_full_parameters_are_the_same_objects_after_a_selection() -> None:
    layer = make()
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    full = layer.lora_A, layer.lora_B
    layer.select([1, 2])
    assert layer.full_A is not full[0]  # a wrapper made now must not take it for one that is trained
    layer.unfold()
    assert (layer.lora_A, layer.lora_B) == full
    assert all(p.requires_grad for p in full)
    before = layer.lora_A.detach().clone()
    step(layer, optimizer)
    assert not torch.equal(layer.lora_A, before)


def test_selecting_all_modules_keeps_the_full_parameters() -> None:
    layer = make()
    full = layer.lora_A, layer.lora_B
    for form in ("folded", "frozen"):
        layer.select(range(RANK), form)
        assert (layer.lora_A, layer.lora_B) == full
        assert layer.full_A is None
        assert layer.selected == tuple(range(RANK))
        step(layer, torch.optim.SGD(full, lr=0.1))
        layer.lora_A.requires_grad_(False)
        layer.unfold()
        assert layer.lora_A.requires_grad


def test_compact_parameters_are_used_again_while_something_holds_them() -> None:
    layer = make()
    layer.select([0, 3])
    held = layer.lora_A, layer.lora_B
    layer.unfold()
    layer.select([1])
    layer.unfold()
    layer.select([2, 4])
    assert (layer.lora_A, layer.lora_B) == held
    reference = weakref.ref(held[0])
    del held
    layer.unfold()
    gc.collect()
    assert reference() is None  # the layer itself does not keep them
    layer.select([0, 3])
    assert layer.lora_A.requires_grad


def test_selecting_the_same_again_changes_nothing() -> None:
    layer = make()
    layer.select([1, 4])
    layer(torch.randn(2, 7)).sum().backward()
    state = layer.lora_A, layer.lora_A.grad, layer.lora_A._version, layer.weight.data_ptr(), layer.weight._version
    layer.select([4, 1])
    assert state == (
        layer.lora_A, layer.lora_A.grad, layer.lora_A._version, layer.weight.data_ptr(), layer.weight._version
    )  # fmt: skip
    x = torch.randn(3, 7)
    layer.unfold()
    layer.scale = 7.0
    expected = layer(x)
    layer.scale = 0.5
    layer.select([1, 4])
    layer.scale = 7.0  # another scale: what is folded is no longer right
    layer.select([1, 4])
    torch.testing.assert_close(layer(x), expected)


def test_a_frozen_side_stays_frozen_when_as_many_modules_are_selected() -> None:
    layer = make()
    layer.select([0, 1])
    layer.lora_A.requires_grad_(False)
    layer.select([2, 3])
    assert not layer.lora_A.requires_grad
    layer.unfold()
    assert layer.lora_A.requires_grad


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1)])
def test_an_optimizer_that_holds_a_replaced_parameter_raises(make_optimizer) -> None:  # type: ignore[no-untyped-def]
    layer, head = make(), nn.Linear(5, 2)
    optimizer = make_optimizer([*layer.parameters(), *head.parameters()])
    layer.select([0, 1])
    head(layer(torch.randn(4, 7))).sum().backward()
    before = head.weight.detach().clone()
    with pytest.raises(
        pk.StateError, match=r"parameter \(6, 7\) that select\(\) replaced.*build it from the parameters"
    ):
        optimizer.step()
    assert torch.equal(head.weight, before)
    layer.unfold()
    head(layer(torch.randn(4, 7))).sum().backward()
    optimizer.step()  # the full parameters are in use again
    layer.select([0, 1])
    compact = make_optimizer([p for p in layer.parameters() if p.requires_grad])
    layer.select([0, 1, 2])
    with pytest.raises(pk.StateError, match=r"parameter \(2, 7\) that unfold\(\) replaced"):
        compact.step()
    layer.select([3, 4])
    step(layer, compact)


def test_hooks_that_would_be_lost_are_refused() -> None:
    layer = make()
    layer.lora_A.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(pk.StateError, match="gradient hooks, which would be lost"):
        layer.select([1])
    assert layer.selected is None
    layer.select(range(RANK))  # these are the same parameters
    model = nn.Sequential(make())
    model[0].lora_B.register_hook(lambda gradient: gradient)
    with pytest.raises(pk.StateError, match="gradient hooks"):
        model[0].select([0, 2])


def test_a_graph_from_before_is_not_used_with_values_from_after() -> None:
    layer = make()
    layer.select([0, 1])
    y = layer(torch.randn(2, 7))
    layer.select([2, 3])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer.unfold()
    y = layer(torch.randn(2, 7))
    layer.select([1], "frozen")
    step(layer, torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1))
    layer.unfold()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_buffers_and_nothing_of_the_selection_in_the_state_dict() -> None:
    layer = make()
    names = list(layer.state_dict())
    for form in ("folded", "frozen"):
        layer.select([1, 2], form)
        assert list(layer.buffers()) == []  # DistributedDataParallel would send them at every forward
        assert list(layer.state_dict()) == names
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_copies_of_a_layer_do_not_share_parameters() -> None:
    layer = make()
    layer.select([0, 2])
    held = layer.lora_A
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.unfold()
        other.select([1, 3])
        assert other.lora_A is not held
        assert torch.equal(other.factors()[0], layer.factors()[0])
    assert layer.lora_A is held


def test_moving_a_layer_between_selections_makes_new_parameters() -> None:
    layer = make()
    layer.select([0, 2])
    held = layer.lora_A
    layer.unfold()
    layer.double()
    layer.select([1, 3])
    assert layer.lora_A is not held
    assert layer(torch.randn(2, 7, dtype=torch.float64)).dtype is torch.float64


def test_a_handle_keeps_the_parameters_of_every_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    handle = pk.inject(model, pk.PLoRAConfig(rank=RANK, target_modules=["0", "2"]))
    handle.select({"0": [0, 1], "2": [3]})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    kept = [layer.lora_A for layer in handle.layers.values()]
    handle.select({"0": [4, 5], "2": [0]})
    assert [layer.lora_A for layer in handle.layers.values()] == kept
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    handle.select([1])
    with pytest.raises(pk.StateError, match="build it from the parameters"):
        optimizer.step()


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.lists(
        st.tuples(st.sets(st.integers(0, RANK - 1)), st.sampled_from(["folded", "frozen"]), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    original=st.sampled_from(["device", "host"]),
)
def test_any_row_of_selections_computes_the_same_and_leaves_the_base(
    chosen: list[tuple[set[int], str, bool]], original: str
) -> None:
    layer = make(original=original)
    weight, factors, x = layer.weight.detach().clone(), layer.factors(), torch.randn(3, 7)
    expected = layer(x)
    for selected, form, unfolds in chosen:
        layer.select(sorted(selected), form)
        torch.testing.assert_close(layer(x), expected)
        assert layer.lora_A.shape == (len(selected), 7)
        if unfolds:
            layer.unfold()
    layer.unfold()
    assert torch.equal(layer.weight, weight)
    for mine, first in zip(layer.factors(), factors, strict=True):
        assert torch.equal(mine, first)


def test_a_trainer_goes_on_with_the_modules_its_callback_selects(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    model = BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    handle = pk.inject(model, pk.PLoRAConfig(rank=RANK, target_modules=["query"]))
    (layer,) = handle.layers.values()
    nn.init.normal_(layer.lora_B)

    class Rounds(TrainerCallback):
        def __init__(self, chosen: list[list[int]]) -> None:
            self.chosen = chosen

        def on_epoch_begin(self, *_: object, **__: object) -> None:
            handle.select(self.chosen.pop(0))

    rows = [{"input_ids": torch.randint(0, 32, (5,)), "labels": row % 2} for row in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=2, report_to=[], save_strategy="no", learning_rate=0.1, disable_tqdm=True,
        use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    before = layer.factors()
    handle.select([0, 1])
    Trainer(model, arguments, train_dataset=rows, callbacks=[Rounds([[2, 3], [0, 4]])]).train()
    handle.unfold()
    moved = [not torch.equal(layer.lora_A[j], before[0][j]) for j in range(RANK)]
    assert moved == [True, False, True, True, True, False]
    with pytest.raises(pk.StateError, match="build it from the parameters"):
        Trainer(model, arguments, train_dataset=rows, callbacks=[Rounds([[2, 3], [0, 4]])]).train()


def test_factors_of_a_layer_that_a_wrapper_divided_are_refused() -> None:
    layer = make()
    layer.lora_A.data = layer.lora_A.data.flatten()[:21]  # as FullyShardedDataParallel leaves a process its part
    with pytest.raises(pk.StateError, match=r"lora_A is \(21,\) in a layer of rank 6: a wrapper.* has divided it"):
        layer.factors()


def test_an_optimizer_of_an_adapter_that_was_taken_out_raises() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["0"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle.restore()
    with pytest.raises(pk.StateError, match=r"restore\(\) replaced"):
        optimizer.step()


def test_factors_are_set_in_every_layer_or_in_none() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules="all-linear"))
    before = handle.factors()
    wrong = {"0": (torch.ones(2, 8), torch.ones(8, 2)), "1": (torch.ones(2, 8), torch.ones(5, 2))}
    with pytest.raises(pk.ShapeError, match=r"lora_B is \(5, 2\)"):
        handle.set_factors(wrong)
    assert torch.equal(handle.layers["0"].lora_A, before["0"][0])
