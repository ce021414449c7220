"""The tuner's trials: for every op whose blocks are chosen by shape, a call that uses them and its expected results.

A forward, a whole backward (for the blocks of dX, because designs differ in how dS and dB are computed) and a fold use
the public functions; the skinny products and projections that share their input use their launchers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import plora_kernels as pk
from bench.cases import FOLDS, Case, Op, Problem, Projection, make_problem
from bench.checks.correctness import Results, check, numbered, plain_results, poisoned_outputs
from plora_kernels.tuning.blocks import Blocks, ShapeClass
from plora_kernels.tuning.lookup import override_blocks

# A check needs more tiles than multiprocessors, not the full size.
CHECK_ROWS = 2048


@dataclass(frozen=True)
class Trial:
    """A call whose kernel uses the blocks of `shape`: `run` is timed, `results` returns its results by name.

    `expected(dtype)` is the same by plain torch.
    """

    shape: ShapeClass
    run: Callable[[], object]
    results: Callable[[], Results]
    expected: Callable[[torch.dtype], Results]

    def with_blocks(self, blocks: Blocks) -> Callable[[], object]:
        """Return `run`, with these blocks forced."""

        def forced() -> object:
            with override_blocks({self.shape.op: blocks}):
                return self.run()

        return forced

    def check(self, blocks: Blocks) -> None:
        """Raise WrongResultError if the results with these blocks are wrong; outputs are filled with NaN first."""
        with override_blocks({self.shape.op: blocks}), poisoned_outputs():
            results = self.results()
        dtype = getattr(torch, self.shape.dtype)
        check(type(blocks).__name__, results, self.expected(torch.float64), self.expected(dtype))


def make_trial(shape: ShapeClass, device: torch.device) -> Trial:
    """Return the trial of a shape class, its tensors drawn on the device."""
    return _MAKERS[shape.op](shape, device)


def for_checking(shape: ShapeClass) -> ShapeClass:
    """Return the class with no more rows than a check needs; a fold's rows are those of its weight."""
    return shape if shape.op == "fold" else replace(shape, m=min(shape.m, CHECK_ROWS))


def _problem(op: Op, k: int, widths: tuple[int, ...], shape: ShapeClass, device: torch.device) -> tuple[Case, Problem]:
    """Draw the tensors of a layer, or of several that share their input."""
    projection = Projection("tuned", shape.op, k, sum(widths), widths if len(widths) > 1 else ())
    case = Case(op, projection, 0 if op in FOLDS else shape.m, shape.r, shape.dtype)
    return case, make_problem(case, device)


def _forward(shape: ShapeClass, device: torch.device) -> Trial:
    case, problem = _problem("forward", shape.d_in, (shape.d_out,), shape, device)

    def run() -> Tensor:
        with torch.no_grad():
            return pk.plora_linear(problem.x, problem.weight, problem.A, problem.B, scale=problem.scale)

    return Trial(shape, run, lambda: {"y": run()}, lambda dtype: plain_results(case, problem, dtype, adapted=True))


def _input_gradient(shape: ShapeClass, device: torch.device) -> Trial:
    case, problem = _problem("forward_backward", shape.d_out, (shape.d_in,), shape, device)
    leaves = [tensor.detach().requires_grad_() for tensor in (problem.x, problem.A, problem.B)]
    y = pk.plora_linear(leaves[0], problem.weight, *leaves[1:], scale=problem.scale)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, problem.grad_y, retain_graph=True)

    def expected(dtype: torch.dtype) -> Results:
        found = plain_results(case, problem, dtype, adapted=True)
        return {name: found[name] for name in ("dx", "dA", "dB")}

    return Trial(shape, run, lambda: dict(zip(("dx", "dA", "dB"), run(), strict=True)), expected)


def _side_product(shape: ShapeClass, device: torch.device) -> Trial:
    from plora_kernels.kernels.side_product import side_product

    _, problem = _problem("forward", shape.d_in, (16,), shape, device)

    def run() -> Tensor:
        return side_product(problem.x, problem.A.t(), index=None, dropout=None)

    return Trial(
        shape, run, lambda: {"side": run()}, lambda dtype: {"side": problem.x.to(dtype) @ problem.A.to(dtype).t()}
    )


def _output_gradient(shape: ShapeClass, device: torch.device) -> Trial:
    from plora_kernels.kernels.output_gradient import output_gradient_

    _, problem = _problem("forward", 16, (shape.d_in,), shape, device)
    side, grad_B = problem.x @ problem.A.t(), torch.empty_like(problem.B)

    def run() -> Tensor:
        return output_gradient_(
            grad_B, problem.grad_y, problem.B, side, index=None, out_index=None, scale=problem.scale
        )

    def results() -> Results:
        grad_B.fill_(float("nan"))
        return {"dS": run(), "dB": grad_B.clone()}

    def expected(dtype: torch.dtype) -> Results:
        grad_y, B = problem.grad_y.to(dtype), problem.B.to(dtype)
        return {"dS": grad_y @ B, "dB": problem.scale * (grad_y.t() @ side.to(dtype))}

    return Trial(shape, run, results, expected)


def _factor_gradient(shape: ShapeClass, device: torch.device) -> Trial:
    from plora_kernels.kernels.factor_gradient import factor_gradient_

    _, problem = _problem("forward", shape.d_in, (16,), shape, device)
    thin, grad_A = problem.x @ problem.A.t(), torch.empty_like(problem.A)

    def run() -> Tensor:
        return factor_gradient_(grad_A, thin, problem.x, thin_index=None, out_index=None, scale=problem.scale)

    def results() -> Results:
        grad_A.fill_(float("nan"))
        return {"dA": run().clone()}

    def expected(dtype: torch.dtype) -> Results:
        return {"dA": problem.scale * (thin.to(dtype).t() @ problem.x.to(dtype))}

    return Trial(shape, run, results, expected)


def _fold(shape: ShapeClass, device: torch.device) -> Trial:
    case, problem = _problem("fold", shape.d_in, (shape.d_out,), shape, device)
    weight = problem.weight.clone()

    def run() -> Tensor:
        return pk.fold_(weight, problem.A, problem.B, [], scale=problem.scale)

    def results() -> Results:
        weight.copy_(problem.weight)
        return {"weight": run().clone()}

    return Trial(shape, run, results, lambda dtype: plain_results(case, problem, dtype, adapted=True))


def projection_widths(total: int) -> tuple[int, ...]:
    """Return widths that add up to `total`: one and two of a quarter of it, as for q, k and v, or two halves."""
    return (total // 6 * 4, total // 6, total // 6) if total % 96 == 0 else (total // 2, total - total // 2)


def _projections_forward(shape: ShapeClass, device: torch.device) -> Trial:
    from plora_kernels.kernels.projections_forward import forward

    case, problem = _problem("projections_forward", shape.d_in, projection_widths(shape.d_out), shape, device)
    parts = problem.parts()
    weights, As, Bs = ([getattr(part, name) for part in parts] for name in ("weight", "A", "B"))

    def run() -> tuple[list[Tensor], list[Tensor]]:
        return forward(problem.x, weights, As, Bs, [None] * len(parts), [problem.scale] * len(parts), True)

    def results() -> Results:
        ys, sides = run()
        return numbered("y", ys) | numbered("s", sides)

    def expected(dtype: torch.dtype) -> Results:
        sides = [problem.x.to(dtype) @ A.to(dtype).t() for A in As]
        return {**plain_results(case, problem, dtype, adapted=True), **numbered("s", sides)}

    return Trial(shape, run, results, expected)


def _projections_input_gradient(shape: ShapeClass, device: torch.device) -> Trial:
    from plora_kernels.kernels.projections_backward import input_gradient

    case, problem = _problem("projections", shape.d_out, projection_widths(shape.d_in), shape, device)
    parts = problem.parts()
    grad_ys = [part.grad_y.contiguous() for part in parts]
    sides = [grad_y @ part.B for grad_y, part in zip(grad_ys, parts, strict=True)]
    weights, As = [part.weight for part in parts], [part.A for part in parts]

    def run() -> Tensor:
        return input_gradient(grad_ys, weights, sides, As, [problem.scale] * len(parts))

    def expected(dtype: torch.dtype) -> Results:
        return {"dx": plain_results(case, problem, dtype, adapted=True)["dx"]}

    return Trial(shape, run, lambda: {"dx": run()}, expected)


_MAKERS: dict[str, Callable[[ShapeClass, torch.device], Trial]] = {
    "forward": _forward,
    "input_gradient": _input_gradient,
    "side_product": _side_product,
    "output_gradient": _output_gradient,
    "factor_gradient": _factor_gradient,
    "fold": _fold,
    "projections_forward": _projections_forward,
    "projections_input_gradient": _projections_input_gradient,
}
