"""Groups of samples in a model: in every layer each group has its own modules."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import plora_kernels as pk
from tests.support.models import tiny_llama

SIZES = (3, 0, 2, 1)
GROUPS = len(SIZES)
RANK = 4
SELECTED = [[0, 2], [1], [], [0, 1, 2, 3]]
TOKENS = torch.arange(6 * 5).view(6, 5) % 30


def injected(dropout: float = 0.0, fuse: bool = False) -> pk.Injected:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = pk.PLoRAConfig(rank=RANK, alpha=8.0, dropout=dropout, fuse_projections=fuse)
        return pk.inject(tiny_llama().double(), config)


def stacks(handle: pk.Injected) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random A (C, R, K) and B (C, N, R) for every layer."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tuple(
            torch.randn(GROUPS, *shape, generator=generator, dtype=torch.float64).mul_(0.3).requires_grad_()
            for shape in ((RANK, layer.in_features), (layer.out_features, RANK))
        )
        for name, layer in handle.layers.items()
    }


def run_together(handle: pk.Injected, factors: dict[str, tuple[Tensor, Tensor]], **form: object) -> Tensor:
    rows = pk.RowGroups(SIZES)
    groups = {
        name: pk.GroupModules.of(rows, A, B, SELECTED, scale=handle.layers[name].scale, **form)
        for name, (A, B) in factors.items()
    }
    with handle.grouped(groups):
        return handle.model(input_ids=TOKENS).logits


def run_apart(handle: pk.Injected, factors: dict[str, tuple[Tensor, Tensor]], seeds: list[int]) -> Tensor:
    """Return the same by one forward for each group, with its modules selected and the others frozen."""
    outputs = []
    for group, tokens in enumerate(TOKENS.split(SIZES)):
        if not len(tokens):
            continue
        for name, layer in handle.layers.items():
            layer.set_factors(*(factor[group] for factor in factors[name]))
            layer.dropout_seed = seeds[group]
        handle.select(SELECTED[group], unselected="frozen")
        outputs.append(handle.model(input_ids=tokens).logits)
        handle.unfold()
    return torch.cat(outputs)


@pytest.mark.parametrize("fuse", [False, True])
def test_groups_in_one_pass_are_groups_apart(fuse: bool) -> None:
    handle = injected(fuse=fuse)
    factors = stacks(handle)
    alone = run_apart(handle, factors, [0] * GROUPS)
    torch.testing.assert_close(run_together(handle, factors), alone, rtol=1e-11, atol=1e-11)


def test_gradients_go_to_the_stacks_and_to_selected_modules_alone() -> None:
    handle = injected()
    factors = stacks(handle)
    run_together(handle, factors).square().sum().backward()
    for name, (A, B) in factors.items():
        for group, chosen in enumerate(SELECTED):
            rest = [module for module in range(RANK) if module not in chosen]
            assert not A.grad[group, rest].any()
            assert not B.grad[group][:, rest].any()
            moved = bool(chosen) and SIZES[group] > 0
            assert bool(A.grad[group].any()) == bool(B.grad[group].any()) == moved, name
        assert handle.layers[name].lora_A.grad is None


def test_dropout_is_each_groups_own_and_ends_with_training() -> None:
    handle = injected(dropout=0.5)
    factors, seeds = stacks(handle), [3, 1, 4, 15]
    with_seeds = {"dropout_p": 0.5, "dropout_seeds": seeds}
    handle.model.train()
    together, alone = run_together(handle, factors, **with_seeds), run_apart(handle, factors, seeds)
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)
    handle.model.eval()
    quiet = run_together(handle, factors, **with_seeds)
    assert not torch.equal(quiet, together)
    torch.testing.assert_close(quiet, run_together(handle, factors), rtol=0, atol=0)


def test_a_texts_mask_does_not_depend_on_the_padding_of_others() -> None:
    """Group 0 alone has 3 positions; padded to the 5 of group 1, its real rows get the same masks."""
    handle = injected(dropout=0.5)
    handle.model.train()
    generator = torch.Generator().manual_seed(2)
    name, layer = next(iter(handle.layers.items()))
    x = torch.randn(4, 5, layer.in_features, generator=generator, dtype=torch.float64)
    A, B = (factor[:2] for factor in stacks(handle)[name])
    form = {"dropout_p": 0.5, "dropout_seeds": [7, 8], "scale": 2.0}
    together = pk.GroupModules.of(pk.RowGroups([2, 2], [3, 5]), A, B, **form).linear(x, layer.weight, None)
    one = {"dropout_p": 0.5, "scale": 2.0}
    alone = pk.plora_linear(x[:2, :3], layer.weight, A[0], B[0], **one, dropout_seed=7)
    other = pk.plora_linear(x[2:], layer.weight, A[1], B[1], **one, dropout_seed=8)
    torch.testing.assert_close(together[:2, :3], alone, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(together[2:], other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "form", [{}, {"selected": SELECTED}, {"dropout_p": 0.3, "dropout_seeds": [1, 2, 3, 4]}], ids=str
)
def test_compile_traces_texts_of_any_length_as_one(form: dict[str, object]) -> None:
    handle = injected()
    name, layer = next(iter(handle.layers.items()))
    A, B = stacks(handle)[name]
    groups = pk.GroupModules.of(pk.RowGroups(SIZES), A, B, **form)  # type: ignore[arg-type]
    counter = CompileCounterWithBackend("aot_eager")

    def run(x: Tensor) -> Tensor:
        return groups.linear(x, layer.weight, layer.bias)

    torch.compiler.reset()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for length in (5, 3, 4, 2):  # few rows: with more, a weight for each group would be cheaper, in a graph of its own
        x = torch.randn(sum(SIZES), length, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), run(x))
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), A), torch.autograd.grad(run(x).sum(), A))
    assert counter.frame_count == 2  # one for the first length, one for all others


def test_stacks_may_be_views_of_rows_that_hold_more(each_backend: str) -> None:
    """A cohort keeps each group's parameters side by side in one row."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2, 200, generator=generator)
    weight, x = torch.randn(9, 12, generator=generator), torch.randn(4, 7, 12, generator=generator)
    results = []
    for stack in (rows, rows.clone()):
        A = stack[:, 5:65].unflatten(1, (5, 12))
        B = stack[:, 100:145].unflatten(1, (9, 5))
        if stack is not rows:
            A, B = A.contiguous(), B.contiguous()
        A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
        y = pk.GroupModules.of(pk.RowGroups([3, 1]), A, B, scale=[1.5, 0.5]).linear(x, weight, None)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [A, B])))
    torch.testing.assert_close(*results)


def test_layers_come_back_and_can_be_pickled_inside() -> None:
    handle = injected()
    factors = stacks(handle)
    before = handle.model(input_ids=TOKENS).logits
    run_together(handle, factors)
    assert torch.equal(handle.model(input_ids=TOKENS).logits, before)
    assert pickle.loads(pickle.dumps(next(iter(handle.layers.values())))).groups is None


def test_what_does_not_fit_is_named() -> None:
    handle = injected()
    factors = stacks(handle)
    rows = pk.RowGroups(SIZES)
    groups = {name: pk.GroupModules.of(rows, A, B) for name, (A, B) in factors.items()}
    name, layer = next(iter(handle.layers.items()))
    with pytest.raises(pk.TargetError, match=r"misses layer"), handle.grouped({name: groups[name]}):
        pass
    wrong = groups | {name: pk.GroupModules.of(rows, factors[name][0][:, :, 1:], factors[name][1])}
    with pytest.raises(pk.ShapeError), handle.grouped(wrong):
        pass
    assert layer.groups is None
    handle.select([0])
    with pytest.raises(pk.StateError, match="call unfold"), handle.grouped(groups):
        pass
    handle.unfold()
    with pytest.raises(pk.ShapeError, match="a multiple of 6"), handle.grouped(groups):
        handle.model(input_ids=TOKENS[:5])
    with pytest.raises(pk.ConfigError, match="one number of samples"):
        pk.RowGroups([])
    with pytest.raises(pk.ConfigError, match="4 groups need one each"):
        pk.RowGroups(SIZES, [5, 5])
    with pytest.raises(pk.ShapeError, match="4 groups need"):
        pk.GroupModules.of(rows, factors[name][0][:2], factors[name][1])


@pytest.mark.parametrize("form", [{}, {"selected": [[0], [1]]}, {"scale": [1.0, 2.0]}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("lengths", [None, [2, 3]])
def test_groups_first_met_in_inference_mode_train_afterwards(
    form: dict[str, object], lengths: list[int] | None, each_backend: str
) -> None:
    layer = pk.FusedPLoRALinear(7, 6, rank=RANK)
    A, B = torch.randn(2, RANK, 7, requires_grad=True), torch.randn(2, 6, RANK, requires_grad=True)
    x = torch.randn(2, 3, 7)
    seeds = {"dropout_seeds": [1, 2]} if "dropout_p" in form else {}
    with torch.inference_mode():
        layer.groups = pk.GroupModules.of(pk.RowGroups([1, 1], lengths), A, B, **form, **seeds)
        expected = layer(x).clone()
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert A.grad is not None
    assert B.grad is not None
