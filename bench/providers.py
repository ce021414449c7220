"""Who is measured, each on the same tensors.

*base* is the frozen matmul alone; *peft* PEFT's layer with adapters in the weight's dtype; *peft-autocast* the same
with fp32 adapters under autocast, which is what PEFT makes of a half-precision model; *peft-compiled* is *peft* through
`torch.compile`; *inplace* the in-place algebra of plain torch; *fused* this library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

import plora_kernels as pk
from bench.cases import Case, Op, Problem
from bench.correctness import Results
from bench.inplace import InPlaceLinear
from bench.timing import Step


class ProviderUnavailableError(Exception):
    """A provider that cannot run on this machine; the message is the cause, in one line."""


@dataclass(frozen=True)
class Provider:
    """A provider made ready for one case: `step` is timed, `results` runs it and names what comes out."""

    step: Step
    results: Callable[[], Results]
    adapted: bool


def provider_names(op: Op) -> tuple[str, ...]:
    """List the providers of the suites. PEFT's merge is a host-side state change and has no compiled form."""
    return ("base", "peft", "fused") if op == "fold" else ("base", "peft", "peft-compiled", "fused")


def every_provider(op: Op) -> tuple[str, ...]:
    """List every provider there is for an op."""
    return tuple(FOLD_PROVIDERS if op == "fold" else LINEAR_PROVIDERS)


def make_provider(name: str, case: Case, problem: Problem) -> Provider:
    """Build a provider for a case; raises ProviderUnavailableError where this machine cannot run it."""
    table = FOLD_PROVIDERS if case.op == "fold" else LINEAR_PROVIDERS
    return table[name](case, problem)


def _base(case: Case, problem: Problem) -> Provider:
    return _linear(case, problem, lambda x: F.linear(x, problem.weight), {})


def _peft(case: Case, problem: Problem) -> Provider:
    layer = _peft_layer(case, problem, problem.weight)
    return _linear(case, problem, layer, _peft_factors(layer))


def _peft_autocast(case: Case, problem: Problem) -> Provider:
    if case.torch_dtype not in (torch.bfloat16, torch.float16):
        raise ProviderUnavailableError(f"autocast computes in half precision; the case is {case.dtype}")
    layer = _peft_layer(case, problem, problem.weight, adapter_dtype=torch.float32)

    def call(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=case.torch_dtype):
            return layer(x)

    return _linear(case, problem, call, _peft_factors(layer))


def _peft_compiled(case: Case, problem: Problem) -> Provider:
    # Dynamo counts recompilations by code object, and every case's PEFT layer has the same one.
    torch.compiler.reset()
    layer = _peft_layer(case, problem, problem.weight)
    provider = _linear(case, problem, torch.compile(layer, fullgraph=True), _peft_factors(layer))
    try:
        provider.results()
    except RuntimeError as error:  # what torch.compile raises, a missing C++ compiler included
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ProviderUnavailableError(cause) from error
    return provider


def _inplace(case: Case, problem: Problem) -> Provider:
    factors = {"dA": problem.A.clone(), "dB": problem.B.clone()}
    for factor in factors.values():
        factor.requires_grad_(case.op == "forward_backward")

    def call(x: Tensor) -> Tensor:
        return InPlaceLinear.apply(x, problem.weight, *factors.values(), problem.scale)

    return _linear(case, problem, call, factors)


def _fused(case: Case, problem: Problem) -> Provider:
    linear = _linear_module(problem.weight)
    layer = pk.FusedPLoRALinear.from_linear(linear, rank=case.r, alpha=problem.scale * case.r)
    layer.set_factors(problem.A, problem.B)
    return _linear(case, problem, layer, {"dA": layer.lora_A, "dB": layer.lora_B})


def _linear(case: Case, problem: Problem, call: Callable[[Tensor], Tensor], adapter: Mapping[str, Tensor]) -> Provider:
    """Time `call` on the problem's inputs in turn: without a graph for forward, with every gradient otherwise."""
    backward = case.op == "forward_backward"
    inputs = [(x.detach().requires_grad_(backward), grad_y) for x, grad_y in problem.inputs()]
    turn = 0

    def run() -> Tensor:
        x, grad_y = inputs[turn]
        if not backward:
            with torch.no_grad():
                return call(x)
        y = call(x)
        y.backward(grad_y)
        return y

    def reset() -> None:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        for leaf in (*adapter.values(), *(x for x, _ in inputs)):
            leaf.grad = None

    def results() -> Results:
        nonlocal turn
        reset()
        turn = 0
        named = {"y": run().detach()}
        if backward:
            leaves = {"dx": inputs[0][0], **adapter}
            named |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return named

    return Provider(Step(run, reset), results, adapted=bool(adapter))


def _copy(case: Case, problem: Problem) -> Provider:
    """Copy the weight once: one read and one write of it, the least that any fold does."""
    weight = torch.empty_like(problem.weight)
    return _fold(problem, weight, lambda: weight.copy_(problem.weight), lambda: None, adapted=False)


def _peft_merge(case: Case, problem: Problem) -> Provider:
    weight = problem.weight.clone()
    layer = _peft_layer(case, problem, weight)

    def unmerge() -> None:
        if layer.merged:
            layer.unmerge()

    return _fold(problem, weight, layer.merge, unmerge, adapted=True)


def _inplace_fold(case: Case, problem: Problem) -> Provider:
    weight = problem.weight.clone()

    def fold() -> None:
        weight.addmm_(problem.B, problem.A, alpha=problem.scale)

    return _fold(problem, weight, fold, lambda: None, adapted=True)


def _fused_fold(case: Case, problem: Problem) -> Provider:
    weight = problem.weight.clone()

    def fold() -> None:
        pk.fold_(weight, problem.A, problem.B, [], scale=problem.scale)

    return _fold(problem, weight, fold, lambda: None, adapted=True)


def _fold(
    problem: Problem, weight: Tensor, run: Callable[[], object], undo: Callable[[], None], *, adapted: bool
) -> Provider:
    """Time `run`, which writes `weight` in place; before each call the weight is the original, to the bit."""

    def reset() -> None:
        undo()
        weight.copy_(problem.weight)

    def results() -> Results:
        reset()
        run()
        return {"weight": weight.clone()}

    return Provider(Step(run, reset), results, adapted=adapted)


class _Host(nn.Module):
    """The smallest model PEFT can put an adapter into."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = proj


def _peft_layer(case: Case, problem: Problem, weight: Tensor, adapter_dtype: torch.dtype | None = None) -> PeftLinear:
    """Return PEFT's own LoRA layer over `weight` with the problem's factors, by default in the weight's dtype."""
    config = LoraConfig(
        r=case.r, lora_alpha=problem.scale * case.r, lora_dropout=0.0, target_modules=["proj"], bias="none"
    )
    model = get_peft_model(_Host(_linear_module(weight)), config, autocast_adapter_dtype=False)
    layer = model.base_model.model.proj
    factors = _peft_factors(layer)
    for factor in factors.values():
        factor.data = factor.data.to(weight.device, adapter_dtype or weight.dtype)
    _fill(factors["dA"], problem.A)
    _fill(factors["dB"], problem.B)
    return layer


def _peft_factors(layer: PeftLinear) -> dict[str, nn.Parameter]:
    return {"dA": layer.lora_A["default"].weight, "dB": layer.lora_B["default"].weight}


def _linear_module(weight: Tensor) -> nn.Linear:
    """Return a frozen bias-free nn.Linear that shares `weight`'s storage."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@torch.no_grad()
def _fill(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.copy_(values)


LINEAR_PROVIDERS: dict[str, Callable[[Case, Problem], Provider]] = {
    "base": _base,
    "peft": _peft,
    "peft-autocast": _peft_autocast,
    "peft-compiled": _peft_compiled,
    "inplace": _inplace,
    "fused": _fused,
}
FOLD_PROVIDERS: dict[str, Callable[[Case, Problem], Provider]] = {
    "base": _copy,
    "peft": _peft_merge,
    "inplace": _inplace_fold,
    "fused": _fused_fold,
}
