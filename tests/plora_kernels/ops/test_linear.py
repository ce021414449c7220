"""`plora_linear` and `fold_` as torch operators: torch's own checks (opcheck), layouts of inputs, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import plora_kernels as pk
from plora_kernels import reference
from plora_kernels.selection import index_buffer
from tests.support.equality import assert_equal
from tests.support.groups import draw_grouped
from tests.support.layer_inputs import GROUPS
from tests.support.layer_inputs import layer_inputs as inputs
from tests.support.numerics import in_form, make_problem, run
from tests.support.pairwise import pairwise

SEEDS = torch.tensor([5, 6, 7])
# For each operator: rows of trained modules; bounds and scales of groups; dropout's probability and seeds.
OPERATORS = {
    "linear": (
        index_buffer((1, 3), torch.device("cpu")),
        (),
        {"plain": (0.0, None), "dropout": (0.3, SEEDS[:1])},
    ),
    "grouped_linear": (
        torch.tensor([[0, 2, *[-1] * 14], [-1] * 16, [3, *[-1] * 15]], dtype=torch.int32),
        (torch.tensor(GROUPS), torch.tensor([1.0, 2.0, 0.5])),
        {
            "plain": (0.0, None, None),
            "numbered": (0.3, SEEDS, torch.arange(15).flip(0)),
            "counted": (0.3, SEEDS, None),
        },
    ),
}


# --------------------------------------------------------------------------------------------- torch's own checks


def in_tier(name: str, backend: str, *rest: object) -> Any:
    """Return a case; interpreted kernels of groups take seconds, and those that number their rows stand for them."""
    slow = (name, backend) == ("grouped_linear", "triton") and "numbered" not in rest
    return pytest.param(name, backend, *rest, marks=pytest.mark.slow if slow else ())


OPCHECKED = [
    in_tier(name, *one)
    for name, (_, _, dropout) in OPERATORS.items()
    for one in pairwise(
        ["torch", "triton"],
        [False, True],
        ["all", "indexed"],
        list(dropout),
        [(True, True, True, True), (False, True, False, False)] + [(True, False, True, False)] * (name == "linear"),
    )
]


# opcheck traces the operator several times; it compares shapes, strides and aliases, not values.
@pytest.mark.parametrize(("name", "backend", "frozen", "selected", "dropped", "needs"), OPCHECKED, ids=str)
def test_opcheck_of_the_forward_and_backward(
    name: str, backend: str, frozen: bool, selected: str, dropped: str, needs: tuple[bool, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PLORA_BACKEND", backend)
    chosen, groups, dropouts = OPERATORS[name]
    operands = inputs(groups=GROUPS if groups else None)
    form, dropout = (chosen if selected == "indexed" else None, *groups, 0.5, frozen), dropouts[dropped]
    forward, backward = (getattr(torch.ops.plora, own) for own in (name, f"{name}_backward"))
    torch.library.opcheck(forward.default, (*operands, *form, True, *dropout))
    _, s = forward(*operands, *form, True, *dropout)
    tensors = (torch.randn(3, 5, 6), *(t.detach() for t in (*operands[:4], s)))
    torch.library.opcheck(backward.default, (*tensors, *form, *needs, *dropout))


@pytest.mark.parametrize(
    ("groups", "selected"),
    [(None, None), (None, []), (None, [0, 2]), (GROUPS, None), (GROUPS, [[], [1], [0, 2]])],
    ids=str,
)
def test_gradcheck_in_float64(groups: list[int] | None, selected: list | None) -> None:
    x, weight, lora_A, lora_B, bias = inputs(torch.float64, groups=groups)

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        return pk.plora_linear(x, weight, lora_A, lora_B, selected, bias=bias, scale=0.7, groups=groups)

    assert torch.autograd.gradcheck(run, (x, lora_A, lora_B, bias))


def test_gradcheck_of_the_frozen_form_in_its_selected_modules() -> None:
    x, weight, lora_A, lora_B, bias = inputs(torch.float64)
    rows = torch.tensor([0, 2])

    def run(x: Tensor, part_A: Tensor, part_B: Tensor, bias: Tensor) -> Tensor:
        full_A = lora_A.detach().index_copy(0, rows, part_A)
        full_B = lora_B.detach().index_copy(1, rows, part_B)
        return pk.plora_linear(x, weight, full_A, full_B, [0, 2], bias=bias, scale=0.7, unselected="frozen")

    parts = (t.detach().clone().requires_grad_() for t in (lora_A[rows], lora_B[:, rows]))
    assert torch.autograd.gradcheck(run, (x, *parts, bias))


# ------------------------------------------------------------------------------------------------ forms of input


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_every_way_to_name_a_selection_gives_the_same(form: str, each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    mask = torch.tensor([True, False, False, True])
    ways = (mask, [0, 3], (3, 0), torch.tensor([3, 0]), torch.tensor([0, 3], dtype=torch.int32).numpy())
    ways = (*ways, list(ways[-1]))
    results = [pk.plora_linear(x, weight, lora_A, lora_B, way, unselected=form) for way in ways]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_selecting_all_is_lora_and_selecting_none_is_the_base(each_backend: str) -> None:
    x, weight, lora_A, lora_B, bias = inputs()
    base = torch.nn.functional.linear(x, weight, bias)
    lora = base + 0.5 * x @ lora_A.T @ lora_B.T
    torch.testing.assert_close(pk.plora_linear(x, weight, lora_A, lora_B, bias=bias, scale=0.5), lora)
    torch.testing.assert_close(pk.plora_linear(x, weight, lora_A, lora_B, range(4), bias=bias, scale=0.5), lora)
    torch.testing.assert_close(pk.plora_linear(x, weight, lora_A, lora_B, [], bias=bias, scale=0.5), base)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 3, 7), (2, 3, 4, 7)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...], each_backend: str) -> None:
    _, weight, lora_A, lora_B, bias = inputs()
    x = torch.randn(shape, requires_grad=True)
    y = pk.plora_linear(x, weight, lora_A, lora_B, [1, 2], bias=bias)
    assert y.shape == (*shape[:-1], 6)
    y.sum().backward()
    assert x.grad.shape == shape
    mask = torch.tensor([False, True, True, False])
    torch.testing.assert_close(y, reference.forward(x, weight, lora_A, lora_B, mask, bias=bias))
    assert lora_A.grad is not None
    if x.numel() == 0:
        assert not lora_A.grad.any()


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one", "groups"])
def test_tensors_need_not_be_contiguous(groups: list[int] | None, each_backend: str) -> None:
    _, weight, lora_A, lora_B, _ = inputs(requires_grad=False, groups=groups)
    operands = (torch.randn(3, 5, 7), weight, lora_A, lora_B)
    strided = [torch.randn(t.shape[::-1]).permute(*range(t.dim())[::-1]).copy_(t) for t in operands]
    assert not any(t.is_contiguous() for t in strided)
    bias = torch.randn(6, 2)[:, 0]
    found = []
    for x, own_weight, *factors in (operands, strided):
        leaves = [factor.detach().requires_grad_() for factor in factors]
        y = pk.plora_linear(x, own_weight, *leaves, bias=bias, groups=groups)
        dy = torch.ones(3, 5, 6) if x.is_contiguous() else torch.ones(()).expand(3, 5, 6)  # strides of zero
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    torch.testing.assert_close(*found)


def far_apart(values: Tensor) -> Tensor:
    """Return four rows so far apart in memory that the last starts at element 3·2³⁰ > 2³¹.

    Offsets inside a tile then need 64 bits. Pages between the rows are never touched and take no memory.
    """
    rows, width = values.shape
    storage = torch.empty(2**30 * (rows - 1) + width, dtype=values.dtype)
    return storage.as_strided((rows, width), (2**30, 1)).copy_(values)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("groups", [None, [0, 1, 4]])
def test_strides_beyond_what_32_bits_hold(groups: list[int] | None) -> None:
    several = () if groups is None else (2,)
    x, dy, weight = (torch.randn(shape).half() for shape in ((4, 7), (4, 6), (6, 7)))
    factors = [torch.randn(*several, *shape).half() for shape in ((4, 7), (6, 4))]
    found = []
    for own_x, own_dy in ((far_apart(x), far_apart(dy)), (x, dy)):
        leaves = [own_x.requires_grad_(), *(factor.clone().requires_grad_() for factor in factors)]
        y = pk.plora_linear(leaves[0], weight, *leaves[1:], groups=groups)
        found.append((y, *torch.autograd.grad(y, leaves, own_dy)))
    assert_equal(*found)


@pytest.mark.usefixtures("kernels")
def test_steps_along_a_stride_beyond_what_32_bits_hold() -> None:
    # Column-major x: the second block of K starts 32 strides of 2²⁷ elements away, past 2³¹.
    stride, k = 2**27, 40
    storage = torch.empty(stride * (k - 1) + 3, dtype=torch.float16)
    x = storage.as_strided((3, k), (1, stride))
    x.copy_(torch.randn(3, k))
    weight, lora_A, lora_B = (torch.randn(s).half() for s in ((6, k), (4, k), (6, 4)))
    y = pk.plora_linear(x, weight, lora_A, lora_B)
    assert torch.equal(y, pk.plora_linear(x.contiguous(), weight, lora_A, lora_B))


def test_a_large_side_product_does_not_overflow_half_precision(each_backend: str) -> None:
    # x Aᵀ is 6400; times the scale it would pass 65504, while its product with B does not.
    x, weight = torch.ones(2, 64, dtype=torch.float16), torch.zeros(3, 64, dtype=torch.float16)
    lora_A = torch.full((2, 64), 100.0, dtype=torch.float16, requires_grad=True)
    lora_B = torch.full((3, 2), 2.0**-12, dtype=torch.float16, requires_grad=True)
    y = pk.plora_linear(x, weight, lora_A, lora_B, scale=16.0)
    torch.testing.assert_close(y, torch.full_like(y, 2 * 6400 * 16 / 2**12))
    y.backward(torch.full_like(y, 2.0**-10))
    torch.testing.assert_close(lora_B.grad, torch.full_like(lora_B.grad, 2 * 6400 * 16 / 2**10))


@pytest.mark.parametrize("shape", [(15, 7), (1, 15, 7), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one", "groups"])
def test_the_output_may_be_written_in_place(
    groups: list[int] | None, shape: tuple[int, ...], each_backend: str
) -> None:
    x, weight, lora_A, lora_B, bias = inputs(groups=groups)
    own_bias = bias if groups is None else None
    y = pk.plora_linear(x.detach().reshape(shape), weight, lora_A, lora_B, bias=own_bias, groups=groups)
    expected = torch.relu(y + 1.0)
    y += 1.0
    assert torch.equal(torch.nn.functional.relu(y, inplace=True), expected)
    y.sum().backward()


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one", "groups"])
@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_unselected_modules_get_no_gradient_and_folded_ones_are_not_read(
    form: str, groups: list[int] | None, each_backend: str
) -> None:
    x, weight, lora_A, lora_B, _ = inputs(groups=groups)
    if form == "folded":
        with torch.no_grad():
            lora_A[..., [0, 3], :], lora_B[..., [0, 3]] = float("nan"), float("inf")
    selected = [1, 2] if groups is None else [[1, 2]] * 3
    pk.plora_linear(x, weight, lora_A, lora_B, selected, unselected=form, groups=groups).sum().backward()
    for gradient in (lora_A.grad.mT, lora_B.grad):
        assert not gradient[..., [0, 3]].any()
        assert gradient[..., [1, 2]].any()
    for gradient in (x.grad, lora_A.grad, lora_B.grad):
        assert gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter
@pytest.mark.parametrize("selected", [None, [1], [0, 3]], ids=str)
def test_non_finite_inputs_propagate_as_in_linear(selected: list[int] | None, each_backend: str) -> None:
    _, weight, lora_A, lora_B, bias = (t.detach().abs() for t in inputs())  # of one sign, so that no infinities cancel
    x = torch.rand(3, 5, 7)
    x[0, 0, 0], x[1, 1, 1] = float("nan"), float("inf")
    x.requires_grad_()
    y = pk.plora_linear(x, weight, lora_A, lora_B, selected, bias=bias)
    plain = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(y.isnan(), plain.isnan())
    assert torch.equal(y.isposinf(), plain.isposinf())
    assert y[1, 1].isposinf().all()
    dy = torch.rand(3, 5, 6)
    dy[2, 0, 0] = float("inf")
    y.backward(dy)
    assert torch.equal(x.grad.isposinf(), (dy @ weight).isposinf())
    assert not x.grad.isnan().any()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_only_the_gradients_asked_for(form: str, needs: tuple[bool, ...], each_backend: str) -> None:
    for problem in (
        make_problem(15, 7, 6, 4, torch.float32, **in_form(form, 4, seed=3)),
        draw_grouped((3, 0, 12), 7, 6, 4, torch.float32, share=0.5, unselected=form),
    ):
        given = (problem.x, problem.lora_A, problem.lora_B)
        leaves = [t.clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
        pk.plora_linear(leaves[0], problem.weight, *leaves[1:], **problem.form()).backward(problem.dy)
        every = zip(run(problem)[1:4], needs, strict=True)
        torch.testing.assert_close([leaf.grad for leaf in leaves], [g if need else None for g, need in every])


def test_a_tensor_that_stands_for_its_negative_is_read_as_one(each_backend: str) -> None:
    def negative(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.complex64).conj().imag

    x, weight, lora_A, lora_B, bias = negative(5, 7), negative(6, 7), negative(4, 7), negative(6, 4), negative(6)
    assert all(tensor.is_neg() for tensor in (x, weight, lora_A, lora_B, bias))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    dy = negative(5, 6)
    y = pk.plora_linear(x, weight, lora_A, lora_B, bias=bias)
    torch.testing.assert_close(y, x @ (weight + lora_B @ lora_A).t() + bias)
    pk.plora_linear(leaves[0], weight, lora_A, lora_B, bias=bias).backward(dy)
    (leaves[1] @ (weight + lora_B @ lora_A).t()).backward(dy)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    *operands, dy = (tensor.resolve_neg() for tensor in (x, weight, lora_A, lora_B, dy))
    for place, one in enumerate((x, weight, lora_A, lora_B)):  # the backward reads what the forward kept
        given = [*operands[:place], one, *operands[place + 1 :]]
        for groups in (None, [0, 2, 5]):
            leaves = [tensor.detach().requires_grad_(number != 1) for number, tensor in enumerate(given)]
            factors = leaves[2:] if groups is None else [leaf[None].expand(2, -1, -1) for leaf in leaves[2:]]
            pk.plora_linear(*leaves[:2], *factors, groups=groups).backward(dy)
            expected = [tensor.clone().requires_grad_(number != 1) for number, tensor in enumerate(operands)]
            (expected[0] @ (expected[1] + expected[3] @ expected[2]).t()).backward(dy)
            got, wanted = ([leaf.grad for leaf in some] for some in (leaves, expected))
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    clean = operands
    y = pk.plora_linear(*clean, bias=bias)
    torch.testing.assert_close(y, x @ (weight + lora_B @ lora_A).t() + bias)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops over the batch
@pytest.mark.usefixtures("without_group_weights")
def test_a_batch_of_gradients_is_taken_apart_or_refused_by_name(each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    dys = torch.randn(2, 3, 5, 6)
    y = pk.plora_linear(x, weight, lora_A, lora_B)
    found = torch.autograd.grad(y, (x, lora_A, lora_B), dys, is_grads_batched=True, retain_graph=True)
    for place, dy in enumerate(dys):
        one = torch.autograd.grad(y, (x, lora_A, lora_B), dy, retain_graph=True)
        torch.testing.assert_close([batch[place] for batch in found], one)
    y = pk.plora_linear(x, weight, lora_A[None], lora_B[None], groups=[0, 15])
    if each_backend == "torch":  # of in-place products
        with pytest.raises(pk.UnsupportedError, match="is_grads_batched=True"):
            torch.autograd.grad(y, x, dys, is_grads_batched=True)
    else:
        (batch,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
        torch.testing.assert_close(batch[0], torch.autograd.grad(y, x, dys[0])[0])


@pytest.mark.parametrize("groups", [None, [0, 15]])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_tangent_of_forward_mode_is_refused_by_name(
    enabled: bool, groups: list[int] | None, each_backend: str
) -> None:
    x, weight, lora_A, lora_B, bias = inputs(requires_grad=False)
    factors = (lora_A, lora_B) if groups is None else (lora_A[None], lora_B[None])
    with forward_ad.dual_level(), torch.set_grad_enabled(enabled):
        pk.plora_linear(x, weight, *factors, groups=groups)  # there is no tangent to lose
        for place in range(5):
            given = [x, weight, *factors, bias]
            given[place] = forward_ad.make_dual(given[place], torch.ones_like(given[place]))
            with pytest.raises(pk.UnsupportedError, match="no forward-mode derivative"):
                pk.plora_linear(*given[:4], bias=given[4], groups=groups)
