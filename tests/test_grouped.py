"""Groups of rows with their own modules in one call: the same as one call a group, for both implementations."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import plora_kernels as pk
from plora_kernels import group_products
from plora_kernels.dropout import keep_mask, keep_mask_of_rows
from tests.support.groups import GroupedProblem, draw_grouped
from tests.support.numerics import NAMES, assert_within_bound

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = torch.tensor([5, -3, 2**62], device=DEVICE)


def run(problem: GroupedProblem, **changes: object) -> tuple[Tensor, ...]:
    """Return y, dx, dA, dB, dbias of the operator."""
    leaves = [t.clone().requires_grad_() for t in (problem.x, problem.lora_A, problem.lora_B)]
    bias = None if problem.bias is None else problem.bias.clone().requires_grad_()
    x, lora_A, lora_B = leaves
    y = pk.plora_linear(x, problem.weight, lora_A, lora_B, **problem.form() | {"bias": bias} | changes)
    y.backward(problem.dy)
    return y.detach(), x.grad, lora_A.grad, lora_B.grad, None if bias is None else bias.grad


def run_each(problem: GroupedProblem) -> tuple[Tensor, ...]:
    """Return the same by one call a group."""
    leaves = [t.clone().requires_grad_() for t in (problem.x, problem.lora_A, problem.lora_B)]
    bias = None if problem.bias is None else problem.bias.clone().requires_grad_()
    x, lora_A, lora_B = leaves
    parts = []
    for g, (start, end) in enumerate(itertools.pairwise(problem.bounds)):
        form = problem.form_of(g) | {"bias": bias}
        parts.append(pk.plora_linear(x[start:end], problem.weight, lora_A[g], lora_B[g], **form))
    y = torch.cat(parts)
    y.backward(problem.dy)
    return y.detach(), x.grad, lora_A.grad, lora_B.grad, None if bias is None else bias.grad


def check(problem: GroupedProblem) -> None:
    exact, same_dtype = problem.reference_results(torch.float64), problem.reference_results(problem.x.dtype)
    for name, result, plain, truth in zip(NAMES, run(problem), same_dtype, exact, strict=True):
        if result is not None:
            assert_within_bound(result, plain, truth, name)


# Groups' rows, K, N, R.
SHAPES = (
    ((70, 70, 70), 12, 9, 8),
    ((1,), 1, 1, 1),
    ((0, 7, 0, 19, 7, 7, 1, 0), 50, 29, 5),
    ((33, 16, 0), 24, 40, 17),
    ((5, 5, 5, 5), 64, 16, 33),
)
FORMS = [(None, "folded"), (0.4, "folded"), (0.4, "frozen"), (0.0, "folded"), (0.0, "frozen")]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("share", "form"), FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_within_the_bound(
    shape: tuple, share: float | None, form: str, p: float, each_backend: str
) -> None:
    sizes, k, n, rank = shape
    dtype = (torch.float32, torch.float16)[(len(sizes) + rank + (form == "frozen") + (p > 0)) % 2]
    scales = [0.5 + g for g in range(len(sizes))] if share is None else 0.5
    options = {"share": share, "unselected": form, "dropout_p": p, "scale": scales, "bias": len(sizes) != 4}
    check(draw_grouped(sizes, k, n, rank, dtype, device=DEVICE, **options))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("offsets", [[0, 3, 3, 20, 36, 36], [0, 0, 1], [0, 40], [0, *range(200)]], ids=len)
def test_the_table_of_tiles_by_hand(offsets: list[int]) -> None:
    from plora_kernels.kernels.grouped_tiles import grouped_tiles

    expected = [
        [group, first, end, first - start]
        for group, (start, end) in enumerate(itertools.pairwise(offsets))
        for first in range(start, end, 16)
    ]
    table = grouped_tiles(torch.tensor(offsets, device=DEVICE), offsets[-1], 16).tolist()
    assert table[: len(expected)] == expected
    assert all(row[0] == -1 for row in table[len(expected) :])


@pytest.mark.usefixtures("kernels")
def test_gradients_of_the_kernels_are_deterministic() -> None:
    problem = draw_grouped((700, 0, 1100), 20, 9, 5, torch.float32, device=DEVICE)
    for first, second in zip(run(problem)[2:4], run(problem)[2:4], strict=True):
        assert torch.equal(first, second)


def random_cases(count: int, seed: int) -> list[tuple]:
    source = random.Random(seed)
    forms = itertools.cycle(itertools.product(("folded", "frozen"), (None, 0.0, 0.3, 0.8, 1.0)))
    cases = []
    for number, (form, share) in zip(range(count), forms, strict=False):
        sizes = tuple(source.choice([0, 1, 2, 16, 17, 33, 65, 130]) for _ in range(source.choice([1, 2, 3, 7])))
        # Not K = R = 1: a gradient that is one cancelling sum may be exact in plain torch by luck.
        shape = [source.choice([2, 7, 15, 16, 33, 64, 100]) for _ in range(2)]
        cases.append((sizes, *shape, source.choice([1, 2, 5, 16, 17, 40]), form, share, number))
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", random_cases(30, seed=1), ids=lambda case: "-".join(map(str, case[:6])))
def test_random_groups_on_the_torch_path(case: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    *shape, form, share, number = case
    p = 0.3 if number % 4 == 1 else 0.0
    check(draw_grouped(*shape, dtype, share=share, unselected=form, dropout_p=p, seed=number, device=DEVICE))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("share", "form"), FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_at_once_equal_one_call_a_group(shape: tuple, share: float | None, form: str, p: float) -> None:
    problem = draw_grouped(
        *shape,
        torch.float64,
        share=share,
        unselected=form,
        dropout_p=p,
        scale=[1.0 / (g + 1) for g in range(len(shape[0]))],
    )
    for name, together, alone in zip(NAMES, run(problem), run_each(problem), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12, msg=name)


def test_when_weights_of_their_own_pay() -> None:
    def pays(rows: int, groups: int, n: int, k: int, rank: int) -> bool:
        return group_products.pays(rows, groups, torch.empty(n, k, device="meta"), rank)

    # Ten clients of 16 × 17 rows and 64 features: 272·64² + 4·64²·16 multiplications against 2·272·3·16·128.
    assert pays(2720, 10, 64, 64, 16)
    assert pays(16, 1, 128, 128, 16)  # more of them, but fewer calls
    assert not pays(7, 1, 128, 128, 16)
    assert not pays(160, 10, 512, 128, 16)
    assert not pays(20480, 10, 768, 768, 16)


@pytest.mark.parametrize("by_weights", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_of_plain_products_are_within_the_bound(
    shape: tuple, by_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    monkeypatch.setattr(group_products, "pays", lambda *_: by_weights)
    scales = [0.5 + g for g in range(len(shape[0]))]
    for scale in (0.5, scales):
        check(draw_grouped(*shape, torch.float32, scale=scale, device=DEVICE))


# ------------------------------------------------------------------------------------------------------- dropout


def test_a_row_is_dropped_by_its_number_in_its_group() -> None:
    seeds, sizes = torch.tensor([3, 9]), torch.tensor([4, 6])
    numbers = torch.cat([torch.arange(4), torch.arange(6)])
    together = keep_mask_of_rows(seeds.repeat_interleave(sizes), numbers, 7, 0.5)
    alone = [keep_mask(seed, int(size), 7, 0.5) for seed, size in zip(seeds, sizes, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_dropout_drops_the_same_elements_as_one_call_a_group(each_backend: str) -> None:
    # With W = 0 and modules that pick out features, y is zero exactly where an element was dropped.
    k = 16
    x, weight = torch.ones(50, k, device=DEVICE), torch.zeros(k, k, device=DEVICE)
    eye = torch.eye(k, device=DEVICE).expand(3, k, k)
    y = pk.plora_linear(x, weight, eye, eye, groups=[0, 17, 17, 50], dropout_p=0.5, dropout_seed=SEEDS)
    kept = torch.cat([keep_mask(SEEDS[0], 17, k, 0.5), keep_mask(SEEDS[2], 33, k, 0.5)])
    assert torch.equal(y != 0, kept)


@pytest.mark.parametrize(("share", "form"), FORMS[:3])
def test_rows_numbered_as_by_default_drop_the_same(share: float | None, form: str, each_backend: str) -> None:
    sizes = (33, 0, 7, 20)
    problem = draw_grouped(sizes, 24, 40, 17, torch.float32, share=share, unselected=form, dropout_p=0.4, device=DEVICE)
    numbers = torch.cat([torch.arange(size) for size in sizes]).to(DEVICE)
    for name, told, counted in zip(NAMES, run(problem, dropout_rows=numbers), run(problem), strict=True):
        assert torch.equal(told, counted), name
    strided = torch.stack([numbers, numbers], 1)[:, 0]
    assert torch.equal(run(problem, dropout_rows=strided)[0], run(problem)[0])
    assert not torch.equal(run(problem, dropout_rows=numbers + 1)[0], run(problem)[0])


@pytest.mark.parametrize(("share", "form"), FORMS[:3])
def test_padding_between_rows_leaves_their_masks(share: float | None, form: str, each_backend: str) -> None:
    # Two texts a group of 3 and 5, 7 and 2 tokens, each text padded to 9: real rows keep the numbers they had.
    texts, longest = ((3, 5), (7, 2)), 9
    sizes, padded_sizes = [sum(lengths) for lengths in texts], [longest * len(lengths) for lengths in texts]
    options = {"share": share, "unselected": form, "dropout_p": 0.4, "device": DEVICE}
    problem = draw_grouped(sizes, 24, 40, 17, torch.float32, **options)
    padded = draw_grouped(padded_sizes, 24, 40, 17, torch.float32, seed=1, **options)
    real = torch.cat([torch.arange(longest) < length for lengths in texts for length in lengths]).to(DEVICE)
    numbers = torch.full((len(real),), -1, device=DEVICE)
    numbers[real] = torch.cat([torch.arange(size) for size in sizes]).to(DEVICE)
    padded.x[real], padded.dy[real], padded.dy[~real] = problem.x, problem.dy, 0.0
    for name in ("weight", "lora_A", "lora_B", "bias"):
        setattr(padded, name, getattr(problem, name))
    padded.problems = problem.problems
    y, dx, *gradients = run(padded, groups=padded.bounds, dropout_rows=numbers)
    for name, result, expected in zip(NAMES, (y[real], dx[real], *gradients), run(problem), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("selected", [None, [[0, 3], [], [1]]], ids=str)
def test_gradcheck_with_dropout(selected: list | None) -> None:
    x, weight, lora_A, lora_B, bias = inputs(torch.float64)

    def call(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        form = {"bias": bias, "dropout_p": 0.4, "dropout_seed": [1, 2, 3], "groups": GROUPS, "scale": [0.7, 0.2, 2.0]}
        return pk.plora_linear(x, weight, lora_A, lora_B, selected, **form)

    assert torch.autograd.gradcheck(call, (x, lora_A, lora_B, bias))


# --------------------------------------------------------------------------------------------- torch's own checks

GROUPS = [0, 6, 6, 15]


def inputs(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> tuple[Tensor, ...]:
    """Return x (3, 5, 7), weight (6, 7), lora_A (3, 4, 7), lora_B (3, 6, 4), bias (6,)."""
    shapes = ((3, 5, 7), (6, 7), (3, 4, 7), (3, 6, 4), (6,))
    x, weight, lora_A, lora_B, bias = (torch.randn(s, dtype=dtype) for s in shapes)
    for tensor in (x, lora_A, lora_B, bias):
        tensor.requires_grad_(requires_grad)
    return x, weight, lora_A, lora_B, bias


INDEX = torch.tensor([[0, 2, *[-1] * 14], [-1] * 16, [3, *[-1] * 15]], dtype=torch.int32)


UNDROPPED = (0.0, None, None)
DROPOUT = (0.3, torch.tensor([5, 6, 7]), torch.arange(15).flip(0))


@pytest.mark.parametrize(
    ("frozen", "index", "dropout"),
    [(False, None, UNDROPPED), (False, INDEX, DROPOUT), (True, INDEX, UNDROPPED), (True, None, (*DROPOUT[:2], None))],
    ids=["all", "folded", "frozen", "counted"],
)
def test_opcheck_of_the_forward_and_backward(
    frozen: bool, index: Tensor | None, dropout: tuple[float, Tensor | None, Tensor | None], each_backend: str
) -> None:
    x, weight, lora_A, lora_B, bias = inputs()
    offsets, scales = torch.tensor(GROUPS), torch.tensor([1.0, 2.0, 0.5])
    arguments = (x, weight, lora_A, lora_B, bias, index, offsets, scales, 0.5, frozen, True, *dropout)
    torch.library.opcheck(torch.ops.plora.grouped_linear.default, arguments)
    _, s = torch.ops.plora.grouped_linear(*arguments)
    dy = torch.randn(3, 5, 6)
    for needs in ((True, True, True, True), (False, True, False, False)):
        tensors = (dy, *(t.detach() for t in (x, weight, lora_A, lora_B, s)), index, offsets, scales)
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
    assert lora_A.grad is not None
    assert lora_A.grad.dtype is torch.float32


def test_double_backward_and_transforms_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_products, "pays", lambda *_: False)  # small layers consist of torch's own operations
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
    for result in results[1:]:
        assert torch.equal(result, results[0])


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
    torch.testing.assert_close(y, expected)
    for leaf, other in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


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
    assert lora_A.grad is not None
    assert lora_B.grad is not None
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
    for whole, beside in zip(*results, strict=True):
        assert torch.equal(whole, beside)


def test_unselected_folded_modules_are_not_read(each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    with torch.no_grad():
        lora_A[:, [0, 3]], lora_B[:, :, [0, 3]] = float("nan"), float("inf")
    pk.plora_linear(x, weight, lora_A, lora_B, [[1, 2]] * 3, groups=GROUPS).sum().backward()
    for leaf in (x, lora_A, lora_B):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, bool, bool], each_backend: str) -> None:
    problem = draw_grouped((3, 0, 12), 7, 6, 4, torch.float32, share=0.5, unselected="frozen", device=DEVICE)
    leaves = (problem.x, problem.lora_A, problem.lora_B)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
    y = pk.plora_linear(leaves[0], problem.weight, *leaves[1:], **problem.form())
    y.backward(problem.dy)
    for leaf, need, gradient in zip(leaves, needs, run(problem)[1:4], strict=True):
        assert (leaf.grad is not None) == need
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient)


# ------------------------------------------------------------------------------------------------------ bad input

GOOD = {"x": (10, 7), "weight": (6, 7), "lora_A": (3, 4, 7), "lora_B": (3, 6, 4)}


def call_with(**changes: object) -> Tensor:
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    return pk.plora_linear(**{**tensors, "groups": [0, 4, 4, 10], **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([0, 4, 9], pk.ShapeError, r"lora_A is \(3, 4, 7\); 2 groups and weight \(N=6, K=7\) need \(2, R, 7\)"),
        ([0, 4, 4, 9], pk.ShapeError, "groups runs from 0 to 9; x has 10 rows and needs 0 to 10"),
        ([1, 4, 4, 10], pk.ShapeError, "groups runs from 1 to 10; x has 10 rows and needs 0 to 10"),
        ([0, 4, 3, 10], pk.ShapeError, "groups falls from 4 to 3 at group 1; offsets may not decrease"),
        ([0, 12, 4, 10], pk.ShapeError, "groups falls from 12 to 4 at group 1; offsets may not decrease"),
        ([10], pk.ShapeError, r"groups is \(1,\); the offsets of C ≥ 1 groups are \(C\+1,\)"),
        ([[0, 10]], pk.ShapeError, r"groups is \(1, 2\); the offsets"),
        ([0.0, 1.0], pk.DTypeError, "groups is torch.float32; offsets are int32 or int64"),
        (torch.tensor([0, 10], device="meta"), pk.DeviceError, "groups is on meta, x on cpu"),
    ],
    ids=str,
)
def test_wrong_groups_are_named(groups: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call_with(groups=groups)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lora_A": torch.zeros(4, 7)}, pk.ShapeError, r"lora_A is \(4, 7\); 3 groups and weight"),
        ({"lora_A": torch.zeros(3, 4, 8)}, pk.ShapeError, r"lora_A is \(3, 4, 8\).*need \(3, R, 7\)"),
        ({"lora_B": torch.zeros(3, 4, 6)}, pk.ShapeError, r"lora_B is \(3, 4, 6\).*need \(3, 6, 4\)"),
        ({"lora_A": torch.zeros(3, 257, 7)}, pk.RankError, "rank is 257"),
        ({"weight": torch.zeros(6)}, pk.ShapeError, r"weight is \(6,\); a matrix"),
        ({"x": torch.zeros(10, 6)}, pk.ShapeError, r"x is \(10, 6\); weight \(N=6, K=7\) needs"),
        ({"selected": [[0], [1]]}, pk.ShapeError, "selected holds 2 selections; 3 groups need one each"),
        ({"selected": [[0], [1], [4]]}, pk.SelectionError, "selected holds module 4; rank 4 has modules 0 to 3"),
        ({"selected": torch.ones(4).bool()}, pk.ShapeError, r"selected is \(4,\); 3 groups of rank 4 need \(3, 4\)"),
        ({"scale": [1.0, 2.0]}, pk.ShapeError, r"scale is \(2,\); 3 groups need one number or \(3,\)"),
        ({"scale": torch.tensor(1.0)}, pk.ShapeError, r"scale is \(\); 3 groups need one number or \(3,\)"),
        ({"scale": [1.0, 2.0, float("nan")]}, pk.ConfigError, "scale is nan; a finite number is needed"),
        ({"scale": torch.ones(3, requires_grad=True)}, pk.ConfigError, "constant floats are needed"),
        ({"scale": "abc"}, pk.ConfigError, "scale is 'abc'; a finite number is needed"),
        ({"dropout_p": 0.1}, pk.ConfigError, "dropout_seed None; 3 integers of 64 bits are needed"),
        ({"dropout_p": 0.1, "dropout_seed": 5}, pk.ConfigError, "dropout_seed 5; 3 integers of 64 bits are needed"),
        ({"dropout_p": 0.1, "dropout_seed": [1, 2, 2**63]}, pk.ConfigError, "3 integers of 64 bits are needed"),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros(2).long()}, pk.ConfigError, r"int64 \(3,\) is needed"),
        ({"dropout_rows": torch.zeros(9).long()}, pk.ConfigError, r"dropout_rows is \(9,\).*int64 \(10,\) is needed"),
        ({"dropout_rows": torch.zeros(10)}, pk.ConfigError, r"dropout_rows is \(10,\) torch.float32; int64"),
        ({"dropout_rows": torch.zeros(10, device="meta").long()}, pk.DeviceError, "dropout_rows is on meta, x on cpu"),
        ({"unselected": "dropped"}, pk.ConfigError, "unselected is 'dropped'"),
        ({"weight": torch.zeros(6, 7, requires_grad=True)}, pk.StateError, "the base is frozen"),
    ],
    ids=str,
)
def test_other_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call_with(**changes)
