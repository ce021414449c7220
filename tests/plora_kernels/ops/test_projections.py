"""Projections of one input: the joint forward and dX against float64, and autograd through them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import plora_kernels as pk
from plora_kernels.kernels import projections_backward, projections_forward
from plora_kernels.ops import projections
from plora_kernels.ops.projections import JointGradient, Projection
from plora_kernels.selection import index_buffer, index_from_mask
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import Hardware
from tests.plora_kernels.kernels.test_designs import blocks_of
from tests.plora_kernels.ops.test_linear import far_apart
from tests.support.equality import assert_equal
from tests.support.notes import note_calls
from tests.support.numerics import Problem, assert_within_bound, make_problem, random_mask, rounding_variance

# Rows, K, the widths and ranks of the projections, which of them have a bias, which are frozen under a mask.
SHAPES = (
    (1, 1, (1, 1), (1, 1), (True, False), (False, False)),
    (37, 50, (29, 7, 1), (5, 0, 40), (True, False, True), (False, False, True)),
    (70, 64, (96, 32, 32), (16, 16, 33), (False, False, False), (True, False, False)),
    (3, 129, (130, 128), (17, 2), (True, True), (True, True)),
)


# Aligned shapes, as on a device: grouped queries, gate and up, a decode step.
LARGE = (
    (520, 1024, (1024, 256, 256), (16, 16, 16), (True, True, True), (False, False, False)),
    (300, 512, (2048, 2048), (64, 8), (False, False), (False, True)),
    (1, 1024, (1024, 256, 256), (16, 4, 0), (False, False, False), (False, False, False)),
)


def name_of(shape: tuple) -> str:
    """Return a shape in words."""
    return f"M{shape[0]}K{shape[1]}N{shape[2]}"


def make_problems(shape: tuple, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Problem]:
    """Return one problem for each projection, all with the same x, each with its own scale."""
    rows, k, widths, ranks, biases, frozen = shape
    problems: list[Problem] = []
    for p, (n, r) in enumerate(zip(widths, ranks, strict=True)):
        mask = random_mask(r, seed=p).to(device) if frozen[p] else None
        form = {"mask": mask, "unselected": "frozen", "scale": 0.5 + p, "bias": biases[p], "device": device}
        problem = make_problem(rows, k, n, max(r, 1), dtype, seed=seed + p, **form)
        problem = replace(problem, lora_A=problem.lora_A[:r], lora_B=problem.lora_B[:, :r].contiguous())
        problems.append(replace(problem, x=problems[0].x if problems else problem.x))
    return problems


def operands_of(problem: Problem) -> Projection:
    """Return a problem's operands, those that train as leaves."""
    trained = None if problem.mask is None else index_from_mask(problem.mask)
    leaves = [t if t is None else t.clone().requires_grad_() for t in (problem.lora_A, problem.lora_B, problem.bias)]
    return Projection(problem.weight, *leaves, problem.scale, trained)


def check(problems: list[Problem], where: str) -> None:
    """Check that every projection's results and the joint dX are within the bound."""
    operands = [operands_of(problem) for problem in problems]
    x = problems[0].x.clone().requires_grad_()
    ys = run(x, operands)
    torch.autograd.backward(ys, [problem.dy for problem in problems])
    d_x: list[Tensor | int] = [0, 0]
    for problem, o, y in zip(problems, operands, ys, strict=True):
        results = (y, None, o.lora_A.grad, o.lora_B.grad, None if o.bias is None else o.bias.grad)
        exact, variances = problem.reference_results(torch.float64), problem.variances()
        for name, result, *bounds in zip(("y", "dx", "dA", "dB", "dbias"), results, exact, variances, strict=True):
            if result is not None:
                assert_within_bound(result.detach(), *bounds, f"{name} {where}")
        d_x = [d_x[0] + exact[1], d_x[1] + variances[1]]
        d_x[1] = d_x[1] + rounding_variance(d_x[0].float(), x.dtype)
    assert_within_bound(x.grad, *d_x, f"dx {where}")  # type: ignore[arg-type]


def run(x: Tensor, operands: list[Projection]) -> list[Tensor]:
    """Return every projection's y, differentiable."""
    joint = JointGradient(x.shape)
    computed = projections.forward(x, operands, keep_s=True)
    return [projections.attach(x, o, c, joint) for o, c in zip(operands, computed, strict=True)]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_results_are_within_the_bound(shape: tuple, dtype: torch.dtype, each_backend: str) -> None:
    check(make_problems(shape, dtype), each_backend)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=name_of)
def test_results_on_the_device_are_within_the_bound(shape: tuple, dtype: torch.dtype) -> None:
    check(make_problems(shape, dtype, "cuda"), "cuda")


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute every projection by itself, and dX by torch's matmuls, as on a Hopper GPU with many rows."""
    for module in (projections_forward, projections_backward):
        monkeypatch.setattr(module, "are_joined", lambda *_: False)
        monkeypatch.setattr(module, "launch", None)  # of the joint kernel


APART = (
    *SHAPES,
    (70, 48, (80, 16, 33), (5, 0, 40), (True, True, False), (False, False, True)),
    (33, 32, (16, 48), (0, 0), (True, False), (False, False)),
)


@pytest.mark.usefixtures("kernels", "nan_filled", "apart")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", APART, ids=name_of)
def test_results_apart_are_within_the_bound(shape: tuple, dtype: torch.dtype) -> None:
    problems = make_problems(shape, dtype)
    check(problems, "apart")
    # The same scale, and output gradients that are not contiguous: columns with gaps, a transpose, a row repeated.
    strided = [
        problems[0].dy.repeat_interleave(2, 1)[:, ::2],
        problems[1].dy.t().contiguous().t(),
        *(problem.dy[:1].expand_as(problem.dy) for problem in problems[2:]),
    ]
    alike = [replace(problem, scale=2.0, dy=dy) for problem, dy in zip(problems, strided, strict=True)]
    check(alike, "apart with the same scale")


@pytest.mark.usefixtures("kernels", "nan_filled", "apart")
@pytest.mark.parametrize("design", ["tile", "two_launch", "persistent", "one_launch", "algebra"])
@pytest.mark.parametrize("keep_s", [True, False])
def test_projections_apart_return_s_only_if_it_is_kept(design: str, keep_s: bool) -> None:
    shape = (70, 48, (80, 16, 32), (5, 0, 33), (True, False, False), (False, False, False))
    problems = make_problems(shape, torch.float16)
    with lookup.override_blocks(blocks_of(design, 16)):
        computed = projections.forward(problems[0].x, [operands_of(problem) for problem in problems], keep_s)
    for problem, (y, s) in zip(problems, computed, strict=True):
        assert_within_bound(y, problem.reference_results(torch.float64)[0], problem.variances()[0], f"y {design}")
        assert s.is_contiguous()
        if keep_s:
            assert s.shape == (70, len(problem.lora_A))
            torch.testing.assert_close(s, problem.x @ problem.lora_A.t(), rtol=2e-3, atol=2e-3)
        else:
            assert s.numel() == 0


@pytest.mark.usefixtures("kernels", "nan_filled", "apart")
def test_dx_apart_does_not_overflow_on_the_way() -> None:
    ds, lora_A = torch.full((3, 2), 3e4).half(), torch.full((2, 16), 1e-3).half()
    dy, weight = torch.zeros(3, 16).half(), torch.randn(16, 16).half()
    for scales in ((4.0, 4.0), (4.0, 8.0)):
        dx = projections_backward.input_gradient([dy] * 2, [weight] * 2, [ds] * 2, [lora_A] * 2, scales)
        torch.testing.assert_close(dx, torch.full((3, 16), 60.0 * sum(scales)).half(), rtol=2e-3, atol=0.0)


BOTH_HALVES = (torch.float16, torch.bfloat16)


def test_many_aligned_rows_of_half_precision_are_apart_on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper, others = Hardware(90, 132), (Hardware(80, 108), Hardware(100, 148), Hardware(0, 1))
    apart = []
    for hardware, rows, dtype, aligned in product(
        (hopper, *others), (1, 1024, 1025, 8192), (*BOTH_HALVES, torch.float32), (True, False)
    ):
        monkeypatch.setattr(lookup, "hardware_of", lambda device, found=hardware: found)
        if not projections_forward.are_joined(rows, dtype, torch.device("cpu"), aligned):
            apart.append((hardware, rows, dtype, aligned))
    assert apart == [(hopper, rows, dtype, True) for rows, dtype in product((1025, 8192), BOTH_HALVES)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("rows", "widths", "dtype", "joined"),
    [
        (9, (32, 16), torch.float16, False),
        (8, (32, 16), torch.float16, True),
        (9, (32, 16), torch.float32, True),
        (9, (32, 17), torch.float16, True),
    ],
)
def test_the_launchers_ask_with_what_they_are_given(
    rows: int, widths: tuple[int, ...], dtype: torch.dtype, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "hardware_of", lambda device: Hardware(90, 132))
    monkeypatch.setattr(projections_forward, "FEW_ROWS", 8)
    launched: list[str] = []
    for module in (projections_forward, projections_backward):
        note_calls(monkeypatch, module, "launch", lambda kernel, *rest, **named: kernel.__name__, launched)
    check(make_problems((rows, 32, widths, (4, 20), (True, False), (False, False)), dtype), "on a Hopper GPU")
    expected = ["projections_forward_kernel"] * joined + ["projections_input_gradient_kernel"] * joined
    assert launched == expected


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled", "apart")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=name_of)
def test_results_apart_on_the_device_are_within_the_bound(shape: tuple, dtype: torch.dtype) -> None:
    check(make_problems(shape, dtype, "cuda"), "cuda")


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Projection]]:
    """Return x (2, 3, 7) and projections to 6, 4 and 5 features of ranks 3, 2 and 4, the last frozen but for two."""
    x = torch.randn(2, 3, 7, dtype=dtype, requires_grad=True)
    operands = []
    for n, r, bias in ((6, 3, True), (4, 2, False), (5, 4, True)):
        tensors = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((r, 7), (n, r), (n,))]
        trained = index_buffer((0, 2), torch.device("cpu")) if r == 4 else None
        weight = torch.randn(n, 7, dtype=dtype)
        operands.append(Projection(weight, tensors[0], tensors[1], tensors[2] if bias else None, 0.3 * r, trained))
    return x, operands


def alone(x: Tensor, operands: list[Projection]) -> list[Tensor]:
    """Return what `plora_linear` computes for each projection by itself."""
    ys = []
    for weight, lora_A, lora_B, bias, scale, trained in operands:
        selected = None if trained is None else trained[trained >= 0].tolist()
        form = {"bias": bias, "scale": scale, "unselected": "frozen"}
        ys.append(pk.plora_linear(x, weight, lora_A, lora_B, selected, **form))
    return ys


def parameters(operands: list[Projection]) -> list[Tensor]:
    """Return the leaves of every projection that train."""
    return [t for o in operands for t in (o.lora_A, o.lora_B, o.bias) if t is not None]


def test_gradcheck_in_float64() -> None:
    x, operands = leaves()
    operands = operands[:2]  # for a frozen projection finite differences would also move modules that are not trained

    def call(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        moved = [o._replace(lora_A=next(rest), lora_B=next(rest)) for o in operands]
        return tuple(run(x, [o if o.bias is None else o._replace(bias=next(rest)) for o in moved]))

    factors = [t for o in operands for t in (o.lora_A, o.lora_B)]
    assert torch.autograd.gradcheck(call, (x, *factors, operands[0].bias))


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of parts of every dX computed."""
    return note_calls(monkeypatch, projections, "_input_gradient", len)


def assert_same_gradients(x: Tensor, operands: list[Projection], weights: tuple[float, ...]) -> None:
    """Compare the gradients of Σ_p weight_p·y_p², those of weight 0 left out, with those of projections alone."""
    wanted = [x, *parameters(operands)]
    results = []
    for compute in (run, alone):
        terms = [w * y.square().sum() for w, y in zip(weights, compute(x, operands), strict=True) if w]
        results.append(torch.autograd.grad(sum(terms), wanted, allow_unused=True))  # type: ignore[arg-type]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("weights", [(1.0, 2.0, 3.0), (0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)], ids=str)
def test_those_differentiated_together_share_one_dx(weights: tuple[float, ...], sums: list[int]) -> None:
    assert_same_gradients(*leaves(), weights)
    assert sums == [sum(w > 0 for w in weights)]


def test_outputs_may_be_differentiated_one_by_one(sums: list[int]) -> None:
    # As for layers alone: each backward frees only the nodes it ran.
    results = []
    for compute in (run, alone):
        torch.manual_seed(0)
        x, operands = leaves()
        for y in compute(x, operands):
            y.square().sum().backward()
        results.append([x.grad, *(t.grad for t in parameters(operands))])
    torch.testing.assert_close(*results)
    assert sums == [1, 1, 1]


def test_a_graph_kept_may_be_run_again_and_in_part(sums: list[int]) -> None:
    x, operands = leaves()
    ys = run(x, operands)
    total = sum(y.square().sum() for y in ys)
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (part,) = torch.autograd.grad(ys[1].square().sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(total, x)
    assert torch.equal(first, again)
    torch.testing.assert_close(part, torch.autograd.grad(alone(x, operands)[1].square().sum(), x)[0])
    assert sums == [3, 1, 3]


def test_an_output_captured_on_the_way_does_not_stop_dx() -> None:
    x, operands = leaves()
    ys = run(x, operands)
    d_y, d_x = torch.autograd.grad(sum(y.square().sum() for y in ys), (ys[1], x))
    torch.testing.assert_close(d_y, 2 * ys[1])
    torch.testing.assert_close(d_x, torch.autograd.grad(sum(y.square().sum() for y in alone(x, operands)), x)[0])


class NoGradient(torch.autograd.Function):
    """The identity, whose backward returns None."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> None:
        return None


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_output_without_a_gradient_adds_nothing(place: int, sums: list[int]) -> None:
    x, operands = leaves()
    gradients = []
    for compute in (run, alone):
        ys = compute(x, operands)
        ys[place] = NoGradient.apply(ys[place])
        gradients.append(torch.autograd.grad(sum(y.square().sum() for y in ys), x)[0])
    torch.testing.assert_close(*gradients)
    assert sums == [2]


def test_a_backward_that_failed_leaves_nothing_behind(sums: list[int]) -> None:
    x, operands = leaves()
    ys = run(x, operands)
    fails = True

    def fail(gradient: Tensor) -> None:
        if fails:
            raise RuntimeError("stopped")

    handle = ys[0].register_hook(fail)  # the projection whose backward runs last
    total = sum(y.square().sum() for y in ys)
    with pytest.raises(RuntimeError, match="stopped"):
        total.backward(retain_graph=True)
    assert sums == []
    fails = False
    x.grad = None
    (d_x,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(d_x, torch.autograd.grad(sum(y.square().sum() for y in alone(x, operands)), x)[0])
    handle.remove()


def test_double_backward_says_so() -> None:
    x, operands = leaves()
    total = sum(y.square().sum() for y in run(x, operands))
    joint = torch.autograd.grad(total, [x, *parameters(operands)], create_graph=True)
    separate = torch.autograd.grad(sum(y.square().sum() for y in alone(x, operands)), [x, *parameters(operands)])
    torch.testing.assert_close(joint, separate)
    with pytest.raises(pk.UnsupportedError, match="no double backward"):
        joint[0].sum().backward()


def test_the_output_may_be_written_in_place(each_backend: str) -> None:
    x, operands = leaves(torch.float32)
    expected = [torch.relu(y + 1.0) for y in alone(x, operands)]
    for y, value in zip(run(x, operands), expected, strict=True):
        y += 1.0
        result = torch.nn.functional.relu(y, inplace=True)
        torch.testing.assert_close(result, value)
        result.sum().backward()


def test_tensors_need_not_be_contiguous(each_backend: str) -> None:
    _, operands = leaves(torch.float32)
    x = torch.randn(7, 5, 3).permute(2, 1, 0)
    strided = [
        o._replace(
            lora_A=o.lora_A.detach().T.contiguous().T, lora_B=torch.randn(2 * len(o.weight), o.lora_A.shape[0])[::2]
        )
        for o in operands
    ]
    dys = [torch.randn(1, 5, len(o.weight)).expand(3, -1, -1) for o in operands]
    dys[0] = torch.randn(5, 6, 3).permute(2, 0, 1)
    gradients = []
    for compute in (run, alone):
        leaf = x.detach().requires_grad_()
        ys = compute(leaf, strided)
        gradients.append((*ys, *torch.autograd.grad(ys, leaf, dys)))
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("kernels")
def test_strides_beyond_what_32_bits_hold() -> None:
    x = far_apart(torch.randn(4, 7).half())
    operands = [Projection(*(t.half() for t in (o.weight, o.lora_A, o.lora_B)), None, 1.0, None) for o in leaves()[1]]
    assert_equal(run(x, operands), run(x.contiguous(), operands))
    dys = [far_apart(torch.randn(4, len(o.weight)).half()) for o in operands]
    leaf = x.contiguous().requires_grad_()
    assert_equal(*(torch.autograd.grad(run(leaf, operands), leaf, d) for d in (dys, [d.contiguous() for d in dys])))


@pytest.mark.usefixtures("kernels")
def test_the_kernels_repeat_themselves_to_the_bit() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        x, operands = leaves(torch.float32)
        ys = run(x, operands)
        results.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *parameters(operands)])])
    assert_equal(*results)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter
def test_non_finite_values_stay_in_their_projection(each_backend: str) -> None:
    x, operands = leaves(torch.float32)
    with torch.no_grad():
        operands[1].weight[0, 0] = float("inf")
        operands[0].lora_B[:] = float("nan")
        x.abs_()
    ys = run(x, operands)
    assert ys[0].isnan().all()
    assert ys[1][..., 0].isposinf().all()
    assert ys[1][..., 1:].isfinite().all()
    assert ys[2].isfinite().all()


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("some", [False, True])
def test_factor_gradients_of_no_rows_are_zero(some: bool, each_backend: str) -> None:
    lora_A, lora_B = torch.randn(4, 20), torch.randn(24, 4)
    index = index_from_mask(torch.tensor([True, False, True, False])) if some else None
    operands = Projection(torch.randn(24, 20), lora_A, lora_B, None, 0.5, index)
    ds, d_A, d_B = projections._factor_gradients(
        torch.empty(0, 24), torch.empty(0, 20), torch.empty(0, 4), operands, True, True
    )
    assert ds.shape == (0, 4)
    assert not d_A.any()
    assert not d_B.any()
