"""One case measured: every provider checked, weighed and timed in turn; a record for each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from bench.correctness import WrongResultError
from bench.device_health import require_device
from bench.memory import peak_bytes
from bench.simulation.cases import RANK, SimulationCase
from bench.simulation.correctness import Yardstick
from bench.simulation.problem import Problem, Values, make_problem
from bench.simulation.providers import make_step, providers_of
from bench.simulation.resident import peft_loop
from bench.timing import Plan, Step, Timer, WallTimer, interleave
from bench.workers import note, one_line
from fed.allocator import keep_freed_memory

PLAN = Plan(seconds_per_provider=0.5, min_rounds=5, max_rounds=40, warmup_rounds=1)
# Where the cohort's gradients in fp64 take this long, the check was warm-up enough and a few rounds have to do.
LONG_SECONDS, LONG_ROUNDS = 3.0, 3
# On the CPU memory is read from a profile of the step, which costs more than the step: at one size, in small steps.
WEIGHED_COHORT, WEIGHED_TOKENS = 10, 4096
Record = dict[str, object]


@dataclass(frozen=True)
class Found:
    """What came of one provider: its record, and the seconds of each round where it was timed."""

    record: Record
    seconds: list[float] = field(default_factory=list)


class SynchronisedTimer(WallTimer):
    """Times by the host's clock from an idle device to an idle device: launches count, as they do in a simulation."""

    def call(self, run: Callable[[], object]) -> None:
        def run_and_wait() -> None:
            run()
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        super().call(run_and_wait)


def measure(
    case: SimulationCase,
    device: torch.device,
    plan: Plan = PLAN,
    wanted: Sequence[str] | None = None,
) -> dict[str, Found]:
    """Return what was found of every provider; one that is wrong or cannot run is recorded with its cause, not timed.

    The base and PEFT's loop always run: the others are divided by them. Notes each provider's name before it runs
    alone, None before all are timed in turn, and after every round the records as they would be without further ones.
    """
    keep_freed_memory()  # as the simulator's commands do: none of the providers then pays for the others' pages
    problem = make_problem(case, device)
    known = providers_of(case)
    names = [name for name in known if wanted is None or name in wanted or name in ("base", "peft-loop")]
    began = time.perf_counter()
    exact = peft_loop(problem.in_dtype(torch.float64)).gradients()
    took = time.perf_counter() - began
    steps, peaks, causes = _checked(case, device, problem, names, exact)
    if took > LONG_SECONDS:
        plan = replace(plan, min_rounds=LONG_ROUNDS, max_rounds=LONG_ROUNDS, warmup_rounds=0)

    def summed_up(seconds: Mapping[str, list[float]]) -> dict[str, Found]:
        found = {name: Found(dict(zip(("status", "cause"), why, strict=True))) for name, why in causes.items()}
        for name, durations in seconds.items():
            figures = _figures(case, seconds, name) | {"peak_bytes": peaks[name], "status": "timed"}
            found[name] = Found(figures, durations)
        return {name: replace(found[name], record=_facts(case, device, name) | found[name].record) for name in names}

    def tell(seconds: Mapping[str, list[float]]) -> None:
        if len(seconds["base"]) > 1:
            note([one.record for one in summed_up(seconds).values()])

    note(None)
    timed = {name: Step(step, _nothing) for name, step in steps.items()}
    return summed_up(interleave(timed, _timer(device), _nothing, plan, tell))


def _checked(
    case: SimulationCase, device: torch.device, problem: Problem, names: Sequence[str], exact: list[Values]
) -> tuple[dict[str, Callable[[], None]], dict[str, int | None], dict[str, tuple[str, str]]]:
    """Return steps and peak bytes of the providers whose gradients are right, and why the others are left out."""
    yardstick = Yardstick(exact, peft_loop(problem).gradients())
    steps, peaks, causes = {}, {}, {}
    for name in names:
        note(name)
        try:
            step, trainer = make_step(name, problem)
            if trainer is not None and name != "peft-loop":  # whose own gradients made the yardstick
                yardstick.check(name, trainer.gradients())
            peaks[name] = _peak(case, device, step)
            steps[name] = step
        except WrongResultError as error:
            causes[name] = ("wrong", str(error))
        except Exception as error:  # out of memory, an operator that does not run under a transform
            require_device(device.type, error)
            if name in ("base", "peft-loop"):
                raise
            causes[name] = ("not available", one_line(error))
    return steps, peaks, causes


def _figures(case: SimulationCase, seconds: Mapping[str, list[float]], name: str) -> Record:
    medians = {provider: statistics.median(durations) for provider, durations in seconds.items()}
    first, _, third = statistics.quantiles(seconds[name], n=4, method="inclusive")
    return {
        "seconds": medians[name],
        "spread_seconds": third - first,
        "rounds": len(seconds[name]),
        "clients_steps_per_second": case.cohort / medians[name],
        "ratio_to_base": medians[name] / medians["base"],
        "ratio_to_peft_loop": medians[name] / medians["peft-loop"],
    }


def _facts(case: SimulationCase, device: torch.device, provider: str) -> Record:
    return {**case.facts(), "r": RANK, "device": device.type, "threads": torch.get_num_threads(), "provider": provider}


def _peak(case: SimulationCase, device: torch.device, step: Callable[[], None]) -> int | None:
    """Return the most one step allocates beyond what lives before it; None where that is not read."""
    if device.type == "cpu" and (case.cohort != WEIGHED_COHORT or case.tokens > WEIGHED_TOKENS):
        return None
    step()  # the optimiser's state is made by the first step and stays
    return peak_bytes(step, device)


def _timer(device: torch.device) -> Timer:
    return SynchronisedTimer() if device.type == "cuda" else WallTimer()


def _nothing() -> None:
    return None
