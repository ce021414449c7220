"""The state of a run of `python -m bench.gpu`: what is done, what is missing, and descriptions of both."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.cases import Case
from bench.checks.inputs import CheckShape
from bench.checks.operators import check_record
from bench.device.jobs import Check
from bench.harness.records import RecordFile, case_key
from bench.harness.timing import Plan
from bench.measure import chosen_providers
from bench.models.cases import ModelCase
from bench.models.providers import providers_of as model_providers
from bench.simulation.cases import SimulationCase
from bench.simulation.providers import providers_of

# In so many seconds before the end of a stage no work is started.
LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Work:
    """All work of a run, in order, but that whole models come after the steps of many clients."""

    first_checks: Sequence[CheckShape]
    cases: Sequence[Case]
    simulations: Sequence[SimulationCase]
    last_checks: Sequence[CheckShape]
    models: Sequence[ModelCase] = ()

    @property
    def steps(self) -> list[SimulationCase | ModelCase]:
        """Return the cases of training steps in the order they are timed in."""
        return [*self.simulations, *self.models]


@dataclass
class Run:
    """A run's settings and its results so far. `workers` compile ahead; 0 does everything in this process."""

    device: str
    file: RecordFile
    providers: tuple[str, ...]
    workers: int
    plan: Plan
    defaults: bool
    started: float
    end: float
    failed: dict[tuple[object, ...], dict[str, str]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def missing(self, case: Case) -> tuple[str, ...]:
        """Return the providers of a case that have no record."""
        known = self.file.of_case(case.facts())
        return tuple(name for name in chosen_providers(case, self.providers) if name not in known)

    def missing_forms(self, shape: CheckShape) -> tuple[str, ...]:
        """Return the forms of a shape that have no record."""
        done = self.file.done()
        return tuple(form for form in shape.forms() if case_key(check_record(shape, form)) not in done)

    def missing_steps(self, case: SimulationCase | ModelCase) -> tuple[str, ...]:
        """Return the providers of a training step that have no record: none if the base could not run."""
        known = self.file.of_case(case.facts())
        if "base" in known and known["base"]["status"] != "timed":
            return ()
        names = model_providers(case) if isinstance(case, ModelCase) else providers_of(case)
        return tuple(name for name in names if name not in known)


def left(run: Run, work: Work) -> list[str]:
    """Describe what has no record yet."""
    found = [f"{title(case)} ({', '.join(names)})" for case in work.cases if (names := run.missing(case))]
    found += [f"{case.name} ({', '.join(names)})" for case in work.steps if (names := run.missing_steps(case))]
    checks = unchecked(run, [*work.first_checks, *work.last_checks])
    return found + [f"check {check_title(check.shape)}" for check in checks]


def unchecked(run: Run, shapes: Sequence[CheckShape]) -> list[Check]:
    """Return the forms of shapes that have no record."""
    return [Check(shape, forms) for shape in shapes if (forms := run.missing_forms(shape))]


def title(case: Case) -> str:
    """Return a description of a case."""
    rows = f"M {case.m} " if case.m else ""
    return f"{case.op} {case.projection.k}×{case.projection.n} {rows}R {case.r} {case.dtype}"


def check_title(shape: CheckShape) -> str:
    """Return a description of a checked shape."""
    return f"{shape.dtype} M {shape.m} K {shape.k} N {shape.n} R {shape.r}"
