"""Measuring one case of training steps: providers are checked, their memory is read, and all are timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from bench.checks.correctness import WrongResultError
from bench.harness.memory import peak_bytes
from bench.harness.processes import Outcome, note, one_line, require_device
from bench.harness.records import Record, blank
from bench.harness.timing import Plan, Step, WallTimer, interleave, median_and_spread, nothing
from bench.simulation.cases import DIGITS_VIT, IMAGE_TOKENS, RANK, SimulationCase, simulation_cases
from bench.simulation.problem import Problem, Values, make_problem
from bench.simulation.providers import make_step, providers_of
from bench.simulation.resident import peft_loop
from fed.training.memory import keep_freed_memory

NORMS = {"Frobenius": 2.0, "max": float("inf")}
SECONDS_EACH = 120.0
# Providers that are timed in every loop, because the others' times are divided by theirs.
REFERENCES = ("base", "peft-loop")

PLAN = Plan(seconds_per_provider=0.5, min_rounds=5, max_rounds=40, warmup_rounds=1)
# If the cohort's fp64 gradients take this long the case is slow, and gets only a few rounds, without a warm-up.
LONG_SECONDS, LONG_ROUNDS = 3.0, 3
# On the CPU memory is read from a profile of the step, which costs more than the step. So it is read only for language
# models, and for cohorts of this size and batches no larger than this.
WEIGHED_COHORT, WEIGHED_TOKENS = 10, 4096


@dataclass(frozen=True)
class Found:
    """The result of one provider: its record, and the seconds of each round if it was timed."""

    record: dict[str, object]
    seconds: list[float] = field(default_factory=list)


class SynchronisedTimer(WallTimer):
    """A timer by the host's clock from an idle device to an idle device, launches included, as in a simulation."""

    def call(self, run: Callable[[], object]) -> None:
        def run_and_wait() -> None:
            run()
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        super().call(run_and_wait)


def measure(
    case: SimulationCase, device: torch.device, plan: Plan = PLAN, wanted: Sequence[str] | None = None
) -> dict[str, Found]:
    """Return the result of every provider; one that is wrong or cannot run is recorded with its cause and not timed.

    The base and PEFT's loop always run: the others are divided by them. Notes each provider's name before it runs
    alone, None before all are timed in turn, and after every round the records as they would be without further ones.
    """
    keep_freed_memory()  # as the simulator's commands do, so that no provider pays for the others' memory pages
    problem = make_problem(case, device)
    names = [name for name in providers_of(case) if wanted is None or name in wanted or name in REFERENCES]
    began = time.perf_counter()
    exact = peft_loop(problem.in_dtype(torch.float64)).gradients()
    took = time.perf_counter() - began
    steps, peaks, causes = _checked(case, device, problem, names, exact)
    tokens = _tokens(case, problem)
    if took > LONG_SECONDS:
        plan = replace(plan, min_rounds=LONG_ROUNDS, max_rounds=LONG_ROUNDS, warmup_rounds=0)

    def summed_up(seconds: Mapping[str, list[float]]) -> dict[str, Found]:
        found = {name: Found(dict(zip(("status", "cause"), why, strict=True))) for name, why in causes.items()}
        for name, durations in seconds.items():
            figures = _figures(case, tokens, seconds, name) | {"peak_bytes": peaks[name], "status": "timed"}
            found[name] = Found(figures, durations)
        return {name: replace(found[name], record=_facts(case, device, name) | found[name].record) for name in names}

    def note_records(seconds: Mapping[str, list[float]]) -> None:
        if len(seconds["base"]) > 1:
            note([one.record for one in summed_up(seconds).values()])

    note(None)
    timed = {name: Step(step) for name, step in steps.items()}
    timer = SynchronisedTimer() if device.type == "cuda" else WallTimer()
    return summed_up(interleave(timed, timer, nothing, plan, note_records))


def _checked(
    case: SimulationCase, device: torch.device, problem: Problem, names: Sequence[str], exact: list[Values]
) -> tuple[dict[str, Callable[[], None]], dict[str, int | None], dict[str, tuple[str, str]]]:
    """Return steps and peak bytes of the providers whose gradients are right, and why the others are left out."""
    reference = ReferenceGradients(exact, peft_loop(problem).gradients())
    steps, peaks, causes = {}, {}, {}
    for name in names:
        note(name)
        try:
            step, trainer = make_step(name, problem)
            if trainer is not None and name != "peft-loop":  # the bounds are computed from its gradients
                reference.check(name, trainer.gradients())
            peaks[name] = _peak(case, device, step)
            steps[name] = step
        except WrongResultError as error:
            causes[name] = ("wrong", str(error))
        except Exception as error:  # out of memory, an operator that does not run under a transform
            require_device(device.type, error)
            if name in REFERENCES:
                raise
            causes[name] = ("not available", one_line(error))
    return steps, peaks, causes


def _tokens(case: SimulationCase, problem: Problem) -> int:
    """Return the tokens of the cohort's batch, padding left out."""
    masks = [batch["attention_mask"] for batch in problem.batches if "attention_mask" in batch]
    return sum(int(mask.sum()) for mask in masks) or case.tokens


def _figures(case: SimulationCase, tokens: int, seconds: Mapping[str, list[float]], name: str) -> dict[str, object]:
    medians = {provider: statistics.median(durations) for provider, durations in seconds.items()}
    return {
        "seconds": medians[name],
        "spread_seconds": median_and_spread(seconds[name])[1],
        "rounds": len(seconds[name]),
        "clients_steps_per_second": case.cohort / medians[name],
        "tokens_per_second": tokens / medians[name],
        "ratio_to_base": medians[name] / medians["base"],
        "ratio_to_peft_loop": medians[name] / medians["peft-loop"],
    }


def _facts(case: SimulationCase, device: torch.device, provider: str) -> dict[str, object]:
    return {**case.facts(), "r": RANK, "device": device.type, "threads": torch.get_num_threads(), "provider": provider}


def _peak(case: SimulationCase, device: torch.device, step: Callable[[], None]) -> int | None:
    """Return the peak bytes of one step beyond those before it, or None if they are not read."""
    weighed = case.is_language_model or (case.cohort == WEIGHED_COHORT and case.tokens <= WEIGHED_TOKENS)
    if device.type == "cpu" and not weighed:
        return None
    step()  # the first step makes the optimiser's state
    return peak_bytes(step, device)


class ReferenceGradients:
    """The exact gradients, and the bound of their errors.

    Each client's gradients count as one vector g; a provider's must satisfy, in Frobenius and in max norm,
    ‖g − exact‖/‖exact‖ ≤ max(2·e, 4·eps), where e is the largest such error of PEFT's loop over the clients, in the
    measured precision.
    """

    def __init__(self, exact: list[Values], peft: list[Values]) -> None:
        self.exact = exact
        eps = max(torch.finfo(value.dtype).eps for value in peft[0].values())
        self.bounds = {norm: max(2 * max(_errors(peft, exact, order)), 4 * eps) for norm, order in NORMS.items()}

    def check(self, provider: str, found: list[Values]) -> None:
        """Raise WrongResultError naming the provider, the client, the error and the bound."""
        if len(found) != len(self.exact):
            raise WrongResultError(f"{provider} gives gradients of {len(found)} clients, not of {len(self.exact)}")
        for norm, order in NORMS.items():
            for client, error in enumerate(_errors(found, self.exact, order)):
                if not error <= self.bounds[norm]:
                    raise WrongResultError(
                        f"{provider}: the gradients of client {client} are off by {error:.3g} in relative {norm} norm; "
                        f"the bound is {self.bounds[norm]:.3g}"
                    )


def _errors(found: list[Values], exact: list[Values], order: float) -> list[float]:
    return [_error(one, other, order) for one, other in zip(found, exact, strict=True)]


def _error(found: Values, exact: Values, order: float) -> float:
    """Return ‖found − exact‖/‖exact‖ of all values as one vector; infinity if names or shapes differ."""
    if found.keys() != exact.keys() or any(found[name].shape != value.shape for name, value in exact.items()):
        return float("inf")
    difference = _norm([found[name].double() - value for name, value in exact.items()], order)
    return (difference / _norm(list(exact.values()), order)).item()


def _norm(tensors: list[Tensor], order: float) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, order) for t in tensors]), order)


@dataclass(frozen=True)
class Simulation:
    """A case on a device, sent to a process: the providers to measure, and the errors of those that failed before."""

    case: SimulationCase
    device: str
    providers: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


def device_simulations(device_type: str) -> tuple[SimulationCase, ...]:
    """List a device's cases, the most important first; on the CPU a tiny one that tries everything."""
    if device_type == "cuda":
        return simulation_cases("cuda")
    return (SimulationCase(DIGITS_VIT, 2, IMAGE_TOKENS, 2, "float32"),)


def simulate(work: Simulation) -> list[Record]:
    """Measure one case."""
    wanted = [name for name in work.providers if name not in work.failed]
    found = measure(work.case, torch.device(work.device), wanted=wanted)
    return [one.record for one in found.values()]


class StepCase(Protocol):
    """What a case of training steps says of itself."""

    @property
    def name(self) -> str: ...

    def facts(self) -> dict[str, object]: ...


class StepWork(Protocol):
    """A case of training steps sent to a process, as `Simulation` is."""

    @property
    def case(self) -> StepCase: ...

    @property
    def device(self) -> str: ...

    @property
    def providers(self) -> tuple[str, ...]: ...

    @property
    def failed(self) -> Mapping[str, str]: ...


def simulation_records(work: StepWork, outcome: Outcome) -> list[Record]:
    """Return a record per wanted provider, from the result of a process or, if it was stopped, from its notes.

    Without either, the providers that the others are divided by did not run: then there is one record, of the base,
    with the cause.
    """
    found: list[Record] | None = outcome.value
    if found is None:
        found = next((noted for noted in reversed(outcome.notes) if isinstance(noted, list)), None)
    if found is None:
        return [_lost(work, "base", outcome.error)]
    named: dict[str, Record] = {record["provider"]: blank(**record) for record in found}
    named |= {name: _lost(work, name, cause) for name, cause in work.failed.items()}
    return [named[name] for name in work.providers if name in named]


def blamed(outcome: Outcome, references: Sequence[str] = REFERENCES) -> str | None:
    """Return the provider that ran alone when its process was stopped, if one did that others are not divided by."""
    last = None if outcome.cut else outcome.last_note
    return last if isinstance(last, str) and last not in references else None


def _lost(work: StepWork, provider: str, cause: str | None) -> Record:
    facts = {**work.case.facts(), "device": work.device, "provider": provider}
    return blank(**facts, status="not available", cause=cause)
