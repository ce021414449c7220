"""`Provider`, and the step of providers that pass rows through layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import BACKWARD, Case, Problem
from bench.checks.correctness import WITH_ADAPTER, WITHOUT_ADAPTER, Expected, Results, numbered
from bench.harness.timing import Step
from bench.providers.dropout_masks import seeded


class ProviderUnavailableError(Exception):
    """A provider that cannot run on this machine; the message is the cause, in one line."""


@dataclass(frozen=True)
class Provider:
    """A provider made ready for one case: `step` is timed, `results` runs it and returns results by name.

    `expected` describes the right results. `results` seeds torch's generator, so that dropout can be
    checked; timed calls do not.
    """

    step: Step
    results: Callable[[], Results]
    expected: Expected


Maker = Callable[[Case, Problem], Provider]
# x (m, k) to the y (m, n) of each projection.
Call = Callable[[Tensor], tuple[Tensor, ...]]


def named_factors(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name each projection's A and B after their gradients, as results do."""
    return numbered("dA", As) | numbered("dB", Bs)


def layer_provider(
    case: Case, problem: Problem, call: Call, adapter: Mapping[str, Tensor], kept: Tensor | None = None
) -> Provider:
    """Time `call` on the problem's inputs in turn: without a graph for a forward, with every gradient otherwise.

    `adapter` holds the other tensors with gradients by name; without any the provider is the base. `kept` (m, k)
    tells which elements of x dropout leaves to the adapter in `results`.
    """
    backward = case.op in BACKWARD
    widths = list(problem.widths or problem.weight.shape[:1])
    inputs = [
        (x.detach().requires_grad_(backward), tuple(part.contiguous() for part in grad_y.split(widths, 1)))
        for x, grad_y in problem.inputs()
    ]
    turn = 0

    def run() -> tuple[Tensor, ...]:
        x, grad_ys = inputs[turn]
        if not backward:
            with torch.no_grad():
                return call(x)
        ys = call(x)
        torch.autograd.backward(ys, grad_ys)
        return ys

    def reset() -> None:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        for leaf in (*adapter.values(), *(x for x, _ in inputs)):
            leaf.grad = None

    def results() -> Results:
        nonlocal turn
        reset()
        turn = 0
        with seeded(problem.x.device):
            named = numbered("y", [y.detach() for y in run()])
        if backward:
            leaves = {"dx": inputs[0][0], **adapter}
            named |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return named

    expected = Expected(adapted=True, kept=kept) if kept is not None else WITH_ADAPTER if adapter else WITHOUT_ADAPTER
    return Provider(Step(run, reset), results, expected)
