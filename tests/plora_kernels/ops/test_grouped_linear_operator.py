"""The grouped operator under torch's own checks, and in every form of input."""

from __future__ import annotations

import functools
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import plora_kernels as pk
from plora_kernels.fallback import grouped_products
from tests.support.equality import assert_equal
from tests.support.groups import GROUPS, draw_grouped, inputs, run_groups
from tests.support.pairwise import pairwise

INDEX = torch.tensor([[0, 2, *[-1] * 14], [-1] * 16, [3, *[-1] * 15]], dtype=torch.int32)


SEEDS = torch.tensor([5, 6, 7])
DROPOUT = {
    "plain": (0.0, None, None),
    "numbered": (0.3, SEEDS, torch.arange(15).flip(0)),
    "counted": (0.3, SEEDS, None),
}
OPCHECKED = pairwise(
    ["torch", "triton"],
    [False, True],
    ["all", "indexed"],
    list(DROPOUT),
    [(True, True, True, True), (False, True, False, False)],
)


# Each check traces the operator several times over; what it looks at is shapes, strides and aliases.
@pytest.mark.parametrize(("backend", "frozen", "selected", "dropped", "needs"), OPCHECKED, ids=str)
def test_opcheck_of_the_forward_and_backward(
    backend: str,
    frozen: bool,
    selected: str,
    dropped: str,
    needs: tuple[bool, bool, bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLORA_BACKEND", backend)
    x, weight, lora_A, lora_B, bias = inputs()
    index, dropout = INDEX if selected == "indexed" else None, DROPOUT[dropped]
    offsets, scales = torch.tensor(GROUPS), torch.tensor([1.0, 2.0, 0.5])
    arguments = (x, weight, lora_A, lora_B, bias, index, offsets, scales, 0.5, frozen, True, *dropout)
    torch.library.opcheck(torch.ops.plora.grouped_linear.default, arguments)
    _, s = torch.ops.plora.grouped_linear(*arguments)
    tensors = (torch.randn(3, 5, 6), *(t.detach() for t in (x, weight, lora_A, lora_B, s)), index, offsets, scales)
    backward = (*tensors, 0.5, frozen, *needs, *dropout)
    torch.library.opcheck(torch.ops.plora.grouped_linear_backward.default, backward)


@pytest.mark.parametrize("selected", [None, [[], [1], [0, 2]]], ids=str)
def test_gradcheck_in_float64(selected: list | None) -> None:
    x, weight, lora_A, lora_B, bias = inputs(torch.float64)

    def call(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        return pk.plora_linear(x, weight, lora_A, lora_B, selected, bias=bias, scale=0.7, groups=GROUPS)

    assert torch.autograd.gradcheck(call, (x, lora_A, lora_B, bias))


def test_compile_traces_and_new_groups_do_not_recompile() -> None:
    x, weight, lora_A, lora_B, bias = inputs()
    counter = CompileCounterWithBackend("aot_eager")

    def call(selected: Tensor, groups: Tensor, scale: Tensor, seeds: Tensor, numbers: Tensor) -> Tensor:
        form = {"bias": bias, "unselected": "frozen", "scale": scale}
        form |= {"dropout_p": 0.2, "dropout_seed": seeds, "dropout_rows": numbers}
        return pk.plora_linear(x, weight, lora_A, lora_B, selected, groups=groups, **form)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for turn in range(12):
        chosen = torch.rand(3, 4) > 0.5
        offsets, numbers = torch.tensor([0, turn, turn + 1, 15]), torch.randperm(15)
        arguments = (chosen, offsets, torch.rand(3), torch.randint(99, (3,)), numbers)
        y = compiled(*arguments)
        torch.testing.assert_close(y, call(*arguments))
        y.sum().backward()
    assert counter.frame_count == 1
    with pytest.raises(pk.ShapeError, match="groups falls from 9 to 8 at group 1"):
        compiled(chosen, torch.tensor([0, 9, 8, 15]), torch.rand(3), torch.randint(99, (3,)), numbers)


@pytest.mark.parametrize("active", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_behaves_as_for_linear(active: torch.dtype) -> None:
    x, weight, lora_A, lora_B, bias = inputs()
    with torch.autocast("cpu", dtype=active):
        y = pk.plora_linear(x, weight, lora_A, lora_B, bias=bias, groups=GROUPS)
        assert y.dtype is active
    y.sum().backward()
    assert lora_A.grad.dtype is torch.float32


def test_double_backward_and_transforms_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        grouped_products, "group_weights_are_cheaper", lambda *_: False
    )  # small layers consist of torch's own operations
    x, weight, lora_A, lora_B, _ = inputs()
    y = pk.plora_linear(x, weight, lora_A, lora_B, groups=GROUPS)
    (gradient,) = torch.autograd.grad(y.sum(), lora_A, create_graph=True)
    with pytest.raises(pk.UnsupportedError, match="no double backward"):
        gradient.sum().backward()

    def call(x: Tensor) -> Tensor:
        return pk.plora_linear(x, weight, lora_A, lora_B, groups=GROUPS).sum()

    for transform in (torch.func.grad(call), lambda x: torch.func.jvp(call, (x,), (x,))):
        with pytest.raises(pk.UnsupportedError, match=r"does not run under torch\.func transforms"):
            transform(x.detach())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch asks every tensor it fakes
def test_a_compiler_traces_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_products, "group_weights_are_cheaper", lambda *_: False)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        x, weight, lora_A, lora_B, _ = inputs()
        y = pk.plora_linear(x, weight, lora_A, lora_B, groups=GROUPS)
        whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
        with compiled_autograd._enable(whole) if compiled else nullcontext():
            y.square().sum().backward()
        found.append((x.grad, lora_A.grad, lora_B.grad))
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------------------------ forms of input


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_every_way_to_name_selections_and_groups_gives_the_same(form: str, each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    mask = torch.tensor([[True, False, True, False], [True] * 4, [False, False, False, True]])
    ways = (mask, [[0, 2], None, [3]], [torch.tensor([2, 0]), mask[1], (3,)])
    groups = (GROUPS, torch.tensor(GROUPS), torch.tensor(GROUPS, dtype=torch.int32), tuple(GROUPS))
    scales = (2.0, [2.0, 2.0, 2.0], torch.full((3,), 2.0), 2)
    results = [
        pk.plora_linear(x, weight, lora_A, lora_B, way, unselected=form, groups=offsets, scale=scale)
        for way, offsets, scale in itertools.zip_longest(ways, groups, scales, fillvalue=mask)
    ]
    assert_equal(results[1:], [results[0]] * (len(results) - 1))


def test_tensors_need_not_be_contiguous(each_backend: str) -> None:
    _, weight, lora_A, lora_B, bias = inputs(requires_grad=False)
    x = torch.randn(7, 5, 3).permute(2, 1, 0)
    strided = [torch.randn(t.shape[::-1]).permute(*range(t.dim())[::-1]).copy_(t) for t in (weight, lora_A, lora_B)]
    leaves = [strided[1].requires_grad_(), strided[2].requires_grad_()]
    y = pk.plora_linear(x, strided[0], *leaves, bias=bias, groups=GROUPS)
    y.sum().backward()  # an expanded dy: strides of zero
    plain = [lora_A.clone().requires_grad_(), lora_B.clone().requires_grad_()]
    expected = pk.plora_linear(x.contiguous(), weight, *plain, bias=bias, groups=GROUPS)
    expected.backward(torch.ones(3, 5, 6))
    torch.testing.assert_close([y, *(leaf.grad for leaf in leaves)], [expected, *(leaf.grad for leaf in plain)])


@pytest.mark.parametrize("shape", [(15, 7), (1, 15, 7), (3, 5, 7)], ids=str)
def test_the_output_may_be_written_in_place(shape: tuple[int, ...], each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    x = x.detach().reshape(shape)
    y = pk.plora_linear(x, weight, lora_A, lora_B, groups=GROUPS)
    expected = torch.relu(y + 1.0)
    y += 1.0
    assert torch.equal(torch.nn.functional.relu(y, inplace=True), expected)
    y.sum().backward()


def test_no_rows_at_all(each_backend: str) -> None:
    _, weight, lora_A, lora_B, bias = inputs()
    x = torch.randn(2, 0, 7, requires_grad=True)
    y = pk.plora_linear(x, weight, lora_A, lora_B, [[0], [1], []], bias=bias, groups=[0, 0, 0, 0])
    assert y.shape == (2, 0, 6)
    y.sum().backward()
    assert not lora_A.grad.any()
    assert not lora_B.grad.any()


@pytest.mark.parametrize("form", ["folded", "frozen"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy says it
def test_a_group_that_is_not_finite_touches_no_other(form: str, each_backend: str) -> None:
    selected = [[1, 2], [], [0, 1]]
    results = []
    for broken in (False, True):
        torch.manual_seed(0)
        x, weight, lora_A, lora_B, _ = inputs()
        if broken:
            with torch.no_grad():
                lora_A[0], lora_B[0], x.view(15, 7)[:6] = float("nan"), float("inf"), float("inf")
        y = pk.plora_linear(x, weight, lora_A, lora_B, selected, unselected=form, groups=GROUPS)
        y.sum().backward()
        results.append([y.view(15, 6)[6:], x.grad.view(15, 7)[6:], lora_A.grad[1:], lora_B.grad[1:]])
    assert_equal(*results)


def test_unselected_folded_modules_are_not_read(each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    with torch.no_grad():
        lora_A[:, [0, 3]], lora_B[:, :, [0, 3]] = float("nan"), float("inf")
    pk.plora_linear(x, weight, lora_A, lora_B, [[1, 2]] * 3, groups=GROUPS).sum().backward()
    for leaf in (x, lora_A, lora_B):
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, bool, bool], each_backend: str) -> None:
    problem = draw_grouped((3, 0, 12), 7, 6, 4, torch.float32, share=0.5, unselected="frozen")
    leaves = (problem.x, problem.lora_A, problem.lora_B)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
    y = pk.plora_linear(leaves[0], problem.weight, *leaves[1:], **problem.form())
    y.backward(problem.dy)
    for leaf, need, gradient in zip(leaves, needs, run_groups(problem)[1:4], strict=True):
        assert (leaf.grad is not None) == need
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient)
