"""The providers of folds: of one weight in place, of one into a buffer, of many in place."""

from collections.abc import Callable, Sequence

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

import plora_kernels as pk
from bench.cases import Case, Problem
from bench.checks.correctness import WITH_ADAPTER, WITHOUT_ADAPTER, Expected, Results, numbered
from bench.harness.timing import Step, nothing
from bench.providers.base import Maker, Provider
from bench.providers.peft_layers import peft_siblings


def _provider(
    written: Sequence[Tensor],
    before: Sequence[Tensor] | None,
    run: Callable[[], object],
    undo: Callable[[], None] = nothing,
    expected: Expected = WITH_ADAPTER,
) -> Provider:
    """Time `run`, which writes `written`; before each call `written` is set to `before`, or to NaN without it."""

    def reset() -> None:
        undo()
        for position, weight in enumerate(written):
            weight.fill_(float("nan")) if before is None else weight.copy_(before[position])

    def results() -> Results:
        reset()
        run()
        return numbered("weight", [weight.clone() for weight in written])

    return Provider(Step(run, reset), results, expected)


def _copy(case: Case, problem: Problem) -> Provider:
    """Copy every weight once: one read and one write, the least that any fold needs."""
    originals = [part.weight for part in problem.parts()]
    written = [torch.empty_like(original) for original in originals]

    def copy() -> None:
        for weight, original in zip(written, originals, strict=True):
            weight.copy_(original)

    return _provider(written, None, copy, expected=WITHOUT_ADAPTER)


def _peft(case: Case, problem: Problem) -> Provider:
    originals, written = _weights(problem)
    layers = _peft_layers(case, problem, written)

    def merge() -> None:
        for layer in layers:
            layer.merge()

    return _provider(written, originals, merge, lambda: _unmerge(layers))


def _peft_out(case: Case, problem: Problem) -> Provider:
    _, written = _weights(problem)
    (layer,) = _peft_layers(case, problem, written)

    def merge_copy() -> None:
        written[0].copy_(problem.weight)
        layer.merge()

    return _provider(written, None, merge_copy, lambda: _unmerge([layer]))


def _peft_layers(case: Case, problem: Problem, weights: Sequence[Tensor]) -> list[PeftLinear]:
    return list(peft_siblings(case, problem, weights).children())


def _unmerge(layers: Sequence[PeftLinear]) -> None:
    for layer in layers:
        if layer.merged:
            layer.unmerge()


def _each(problem: Problem, fold: Callable[[Tensor, Problem], object]) -> Provider:
    """Fold every projection's adapter into its weight, one after another."""
    originals, written = _weights(problem)
    parts = problem.parts()

    def fold_all() -> None:
        for weight, part in zip(written, parts, strict=True):
            fold(weight, part)

    return _provider(written, originals, fold_all)


def _inplace(case: Case, problem: Problem) -> Provider:
    return _each(problem, lambda weight, part: weight.addmm_(part.B, part.A, alpha=part.scale))


def _out(problem: Problem, fold: Callable[[Tensor], object]) -> Provider:
    """Fold the adapter and the weight into a buffer."""
    buffer = torch.empty_like(problem.weight)
    return _provider([buffer], None, lambda: fold(buffer))


def _inplace_out(case: Case, problem: Problem) -> Provider:
    return _out(problem, lambda out: torch.addmm(problem.weight, problem.B, problem.A, alpha=problem.scale, out=out))


def _fused_each(case: Case, problem: Problem) -> Provider:
    return _each(problem, lambda weight, part: pk.fold_(weight, part.A, part.B, [], scale=part.scale))


def _fused_out(case: Case, problem: Problem) -> Provider:
    return _out(problem, lambda out: pk.fold(problem.weight, problem.A, problem.B, [], scale=problem.scale, out=out))


def _fused_many(case: Case, problem: Problem) -> Provider:
    originals, written = _weights(problem)
    parts = problem.parts()

    def fold() -> None:
        pairs = zip(written, parts, strict=True)
        pk.fold_many_([pk.Fold(weight, part.A, part.B, [], scale=part.scale) for weight, part in pairs])

    return _provider(written, originals, fold)


def _weights(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Return every projection's weight, and a separate copy of each to fold into."""
    originals = [part.weight for part in problem.parts()]
    return originals, [original.clone() for original in originals]


FOLD: dict[str, Maker] = {"base": _copy, "peft": _peft, "inplace": _inplace, "fused": _fused_each}
FOLD_OUT: dict[str, Maker] = {
    "base": _copy,
    "peft": _peft_out,
    "inplace": _inplace_out,
    "fused-inplace": _fused_each,
    "fused": _fused_out,
}
FOLD_MANY: dict[str, Maker] = {
    "base": _copy,
    "peft": _peft,
    "inplace": _inplace,
    "fused-apart": _fused_each,
    "fused": _fused_many,
}
