"""Measuring one case of whole models: providers are checked, their memory is read, and all are timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from bench.checks.correctness import Results, poisoned_outputs
from bench.harness.memory import peak_bytes
from bench.harness.processes import note, one_line
from bench.harness.records import Record
from bench.harness.timing import Plan, Step, WallTimer, interleave, median_and_spread, nothing
from bench.measure import Exclusions
from bench.models.cases import ModelCase
from bench.models.correctness import Reference
from bench.models.problem import Problem, make_problem
from bench.models.providers import EAGER, Runner, is_compiled, make_runner, providers_of
from bench.providers.base import ProviderUnavailableError
from bench.simulation.cases import RANK
from bench.simulation.measure import Found, SynchronisedTimer
from fed.training.memory import keep_freed_memory

# Providers that are timed in every loop, because the others' times are divided by theirs; each is also the plain torch
# that the results of its kind, without an adapter and with one, are held to.
REFERENCES = ("base", "peft")
PLAN = Plan(seconds_per_provider=6.0, min_rounds=7, max_rounds=40, warmup_rounds=1)
# How long all of a case may take on a GPU, drawing a model and compiling it included.
SECONDS_EACH = 300.0


@dataclass
class _Ready:
    """The providers that can be timed, what a step of each allocates at most, and how long compiling took."""

    runners: dict[str, Runner] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)


def measure(
    case: ModelCase, device: torch.device, plan: Plan = PLAN, wanted: Sequence[str] | None = None
) -> dict[str, Found]:
    """Return the result of every provider; one that is wrong or cannot run is recorded with its cause and not timed.

    The bare base and PEFT always run: the others are divided by them. Notes each provider's name before it runs alone,
    None before all are timed in turn, and after every round the records as they would be without further ones.
    """
    keep_freed_memory()  # so that no provider pays for the others' memory pages
    torch.compiler.reset()  # Dynamo counts recompilations by code object, and the last case's models had the same ones
    problem = make_problem(case, device)
    names = [name for name in providers_of(case) if wanted is None or name in wanted or name in REFERENCES]
    excluded = Exclusions(device)
    ready = _checked(case, device, problem, names, excluded)

    def summed_up(seconds: Mapping[str, list[float]]) -> dict[str, Found]:
        found = {name: Found(dict(zip(("status", "cause"), why, strict=True))) for name, why in excluded.causes.items()}
        for name, durations in seconds.items():
            found[name] = Found(_figures(case, ready, seconds, name) | {"status": "timed"}, durations)
        return {name: replace(found[name], record=_facts(case, device, name) | found[name].record) for name in names}

    def note_records(seconds: Mapping[str, list[float]]) -> None:
        if len(seconds["base"]) > 1:
            note([one.record for one in summed_up(seconds).values()])

    note(None)
    steps = {name: Step(runner.step) for name, runner in ready.runners.items()}
    timer = SynchronisedTimer() if device.type == "cuda" else WallTimer()
    return summed_up(interleave(steps, timer, nothing, plan, note_records))


def _checked(
    case: ModelCase, device: torch.device, problem: Problem, names: Sequence[str], excluded: Exclusions
) -> _Ready:
    """Return the providers whose losses and gradients are right; the others are excluded.

    Those without an adapter are held to the base, the others to PEFT, both in float64.
    """
    exact = {name: make_runner(name, problem.in_float64()).results() for name in REFERENCES}
    references: dict[str, Reference] = {}
    ready = _Ready()
    for name in names:
        if name in REFERENCES:
            note(name)
        with nullcontext() if name in REFERENCES else excluded.alone(name):
            runner, results = _first_results(name, problem, ready)
            kind = "base" if name.startswith("base") else "peft"
            if name in REFERENCES:
                references[name] = Reference(exact[name], results, case.torch_dtype)
            references[kind].check(name, results)
            runner.step()  # the first step makes the optimiser's state
            ready.peaks[name] = peak_bytes(runner.step, device)
            ready.runners[name] = runner
    return ready


def _first_results(name: str, problem: Problem, ready: _Ready) -> tuple[Runner, Results]:
    """Make a provider and return its second results, because later calls replay the first one's launches.

    Outputs of this library are filled with NaN first. Raises ProviderUnavailableError if torch does not compile it.
    """
    began = time.perf_counter()
    if not is_compiled(name):
        runner = make_runner(name, problem)
        with poisoned_outputs() if name in EAGER[2:] else nullcontext():
            return runner, [runner.results() for _ in range(2)][-1]
    try:
        runner = make_runner(name, problem)
        runner.results()
    except RuntimeError as error:  # any error of torch.compile, such as a missing C++ compiler
        raise ProviderUnavailableError(one_line(error)) from error
    ready.compile_seconds[name] = time.perf_counter() - began
    return runner, runner.results()


def _figures(case: ModelCase, ready: _Ready, seconds: Mapping[str, list[float]], name: str) -> dict[str, object]:
    medians = {provider: statistics.median(durations) for provider, durations in seconds.items()}
    figures: dict[str, object] = {
        "seconds": medians[name],
        "spread_seconds": median_and_spread(seconds[name])[1],
        "rounds": len(seconds[name]),
        "tokens_per_second": case.tokens / medians[name],
        "ratio_to_base": medians[name] / medians["base"],
        "ratio_to_peft": medians[name] / medians["peft"],
        "peak_bytes": ready.peaks[name],
        "peak_ratio_to_peft": ready.peaks[name] / ready.peaks["peft"],
    }
    return figures | ({"compile_seconds": ready.compile_seconds[name]} if name in ready.compile_seconds else {})


def _facts(case: ModelCase, device: torch.device, provider: str) -> dict[str, object]:
    return {**case.facts(), "r": RANK, "device": device.type, "threads": torch.get_num_threads(), "provider": provider}


@dataclass(frozen=True)
class ModelStep:
    """A case on a device, sent to a process: the providers to measure, and the errors of those that failed before."""

    case: ModelCase
    device: str
    providers: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


def train_model(work: ModelStep) -> list[Record]:
    """Measure one case."""
    wanted = [name for name in work.providers if name not in work.failed]
    return [one.record for one in measure(work.case, torch.device(work.device), wanted=wanted).values()]
