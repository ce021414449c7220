"""Groups of rows with a base weight each: as one call a group, in both implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import plora_kernels as pk
from plora_kernels.functional import grouped_product
from tests.support.equality import assert_equal
from tests.support.groups import FORMS, draw_grouped, run_each_group
from tests.support.mixed_precision import check_mixed, widened
from tests.support.numerics import DEVICE, NAMES, assert_within_bound, check, differentiated, run
from tests.support.pairwise import pairwise
from tests.support.tiers import mostly_slow

# Groups' rows, K, N, R: among them groups without rows, at the ends too, and one group alone.
SHAPES = (
    ((70, 70, 70), 12, 9, 8),
    ((1,), 1, 1, 1),
    ((0, 7, 0, 19, 7, 7, 1, 0), 50, 29, 5),
    ((33, 16, 0), 24, 40, 17),
    ((5, 5, 5, 5), 64, 16, 33),
)
DTYPES = [torch.float32, torch.float16]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(
    ("shape", "selection", "p", "dtype", "bias", "turned"),
    mostly_slow(pairwise(SHAPES, FORMS, [0.0, 0.4], DTYPES, [False, True], [False, True]), 25),
    ids=str,
)
def test_results_are_within_the_bound(
    shape: tuple, selection: tuple[float | None, str], p: float, dtype: torch.dtype, bias: bool, turned: bool,
    each_backend: str,
) -> None:  # fmt: skip
    share, form = selection
    scales = [0.5 + g for g in range(len(shape[0]))] if share is None else 0.5
    options = {"share": share, "unselected": form, "dropout_p": p, "scale": scales, "bias": bias}
    check(draw_grouped(*shape, dtype, own_weights=True, turned=turned, **options))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, ((40, 0, 333, 2), 260, 130, 16)], ids=str)
def test_the_torch_path_in_every_dtype(shape: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    for turned in (False, True):
        check(draw_grouped(*shape, dtype, own_weights=True, turned=turned))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("shape", SHAPES[2:4], ids=str)
def test_fp32_factors_beside_half_precision(shape: tuple, each_backend: str) -> None:
    check_mixed(widened(draw_grouped(*shape, torch.float16, own_weights=True, turned=shape is SHAPES[3])))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("share", "form"), FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_at_once_equal_one_call_a_group(shape: tuple, share: float | None, form: str, p: float) -> None:
    options = {"share": share, "unselected": form, "dropout_p": p, "device": "cpu", "own_weights": True}
    problem = draw_grouped(*shape, torch.float64, scale=[1.0 / (g + 1) for g in range(len(shape[0]))], **options)
    torch.testing.assert_close(run(problem), run_each_group(problem), rtol=1e-12, atol=1e-12)


def test_one_bias_serves_all_weights(each_backend: str) -> None:
    problem = draw_grouped((3, 0, 12), 7, 6, 4, torch.float32, own_weights=True)
    one = problem.bias[0].clone().requires_grad_()
    several = one.detach().expand(3, 6).clone().requires_grad_()
    form = {"groups": problem.bounds, "scale": 0.5}
    found = []
    for bias in (one, several):
        y = pk.plora_linear(problem.x, problem.weight, problem.lora_A, problem.lora_B, bias=bias, **form)
        y.backward(problem.dy)
        found.append(y.detach())
    assert_equal(*found)
    torch.testing.assert_close(one.grad, several.grad.sum(0))
    assert not several.grad[1].any()


@pytest.mark.usefixtures("kernels", "nan_filled")
@pytest.mark.parametrize("turned", [False, True])
def test_weights_of_any_strides(turned: bool) -> None:
    problem = draw_grouped((5, 0, 20), 16, 24, 3, torch.float32, own_weights=True, turned=turned)
    expected = run(problem)
    padded = torch.full((3, 27, 19), float("nan"), device=DEVICE)
    view = padded[:, 2:26, 1:17]
    view.copy_(problem.weight)
    problem.weight = view
    assert_equal(run(problem), expected)


@pytest.mark.usefixtures("kernels")
def test_the_same_weight_for_all_groups_gives_the_same_bits() -> None:
    problem = draw_grouped((17, 0, 30), 33, 20, 5, torch.float32)
    expected = run(problem)
    problem.weight = problem.weight.expand(3, *problem.weight.shape)  # a group stride of zero
    found = run(problem)
    assert_equal(found[:4], expected[:4])
    torch.testing.assert_close(found[4], expected[4])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter
def test_a_weight_that_is_not_finite_touches_no_other_group(each_backend: str) -> None:
    problem = draw_grouped((6, 0, 9), 7, 6, 4, torch.float32, own_weights=True)
    expected = run(problem)
    problem.weight[:2] = float("nan")
    found = run(problem)
    assert found[0][:6].isnan().all()
    assert_equal([found[0][6:], found[1][6:], *found[2:]], [expected[0][6:], expected[1][6:], *expected[2:]])


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_without_modules(shape: tuple, dtype: torch.dtype, bias: bool, each_backend: str) -> None:
    problem = draw_grouped(*shape, dtype, share=0.0, own_weights=True, turned=bias, bias=bias)
    offsets = torch.tensor(problem.bounds, device=DEVICE)

    def product(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
        return grouped_product(x, problem.weight, offsets, bias)

    exact, variances = problem.reference_results(torch.float64), problem.variances()
    found = differentiated(problem, product)
    for name, result, truth, variance in zip(NAMES, found, exact, variances, strict=True):
        if name in ("dA", "dB"):
            assert result is None
        elif result is not None:
            assert_within_bound(result, truth, variance, name)


def test_offsets_on_the_device_and_no_rows(each_backend: str) -> None:
    problem = draw_grouped((0, 0, 0), 7, 6, 4, torch.float32, own_weights=True)
    y, d_x, d_A, d_B, d_bias = run(problem, groups=torch.tensor(problem.bounds, device=DEVICE, dtype=torch.int32))
    assert y.shape == (0, 6)
    assert d_x.shape == (0, 7)
    assert not any(gradient.any() for gradient in (d_A, d_B, d_bias))


def test_compile_traces_and_new_groups_do_not_recompile() -> None:
    problem = draw_grouped((6, 0, 9), 7, 6, 4, torch.float32, own_weights=True)
    counter = CompileCounterWithBackend("aot_eager")
    leaves = [tensor.clone().requires_grad_() for tensor in (problem.x, problem.lora_A, problem.lora_B, problem.bias)]

    def call(groups: Tensor) -> Tensor:
        x, lora_A, lora_B, bias = leaves
        return pk.plora_linear(x, problem.weight, lora_A, lora_B, bias=bias, groups=groups, scale=2.0)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for turn in range(4):
        offsets = torch.tensor([0, turn, turn + 1, 15])
        found = [(y.detach(), *torch.autograd.grad(y, leaves, problem.dy)) for y in (compiled(offsets), call(offsets))]
        torch.testing.assert_close(*found)
    assert counter.frame_count == 1


@pytest.mark.parametrize("needs", [(True, True, True, True), (True, False, False, False)], ids=str)
def test_opcheck_of_the_forward_and_backward(needs: tuple[bool, ...]) -> None:
    problem = draw_grouped((6, 0, 9), 7, 6, 4, torch.float32, own_weights=True)
    operands, offsets = (problem.x, problem.weight, problem.lora_A, problem.lora_B), torch.tensor(problem.bounds)
    rest = (None, offsets, None, 0.5, False)
    none = (0.0, None, None)
    leaves = [tensor if tensor is problem.weight else tensor.clone().requires_grad_() for tensor in operands]
    torch.library.opcheck(torch.ops.plora.grouped_linear, (*leaves, problem.bias, *rest, True, *none))
    _, s = torch.ops.plora.grouped_linear(*operands, problem.bias, *rest, True, *none)
    torch.library.opcheck(torch.ops.plora.grouped_linear_backward, (problem.dy, *operands, s, *rest, *needs, *none))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": (2, 6, 7)}, pk.ShapeError, r"weight is \(2, 6, 7\); 3 groups need \(3, N, K\) or one matrix"),
        ({"weight": (1, 3, 6, 7)}, pk.ShapeError, r"weight is \(1, 3, 6, 7\); a matrix \(N, K\) is needed, or with 3"),
        ({"weight": (3, 7, 6)}, pk.ShapeError, r"lora_A is \(3, 4, 7\); 3 groups and weight \(N=7, K=6\)"),
        ({"bias": (3, 7)}, pk.ShapeError, r"bias is \(3, 7\); weight \(N=6, K=7\) needs \(6,\) or \(3, 6\)"),
        ({"bias": (3,)}, pk.ShapeError, r"bias is \(3,\); weight \(N=6, K=7\) needs \(6,\) or \(3, 6\)"),
        ({"weight": (6, 7), "bias": (3, 6)}, pk.ShapeError, r"bias is \(3, 6\); weight \(N=6, K=7\) needs \(6,\)"),
        ({"x": (10, 6)}, pk.ShapeError, r"x is \(10, 6\); weight \(N=6, K=7\) needs \(…, 7\)"),
    ],
    ids=str,
)
def test_wrong_shapes_are_named(changes: dict, error: type[Exception], message: str) -> None:
    shapes = {"x": (10, 7), "weight": (3, 6, 7), "lora_A": (3, 4, 7), "lora_B": (3, 6, 4), "bias": (3, 6)} | changes
    with pytest.raises(error, match=message):
        pk.plora_linear(**{name: torch.zeros(shape) for name, shape in shapes.items()}, groups=[0, 4, 4, 10])


def test_one_call_takes_a_matrix() -> None:
    with pytest.raises(pk.ShapeError, match=r"weight is \(3, 6, 7\); a matrix \(N, K\) is needed"):
        pk.plora_linear(torch.zeros(10, 7), torch.zeros(3, 6, 7), torch.zeros(4, 7), torch.zeros(6, 4))
