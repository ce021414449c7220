"""Measuring one case: every provider is made and checked, its memory read, and all are timed in turn.

`measure` is for the suites: a wrong result raises an error. `measure_on_device` is for `python -m bench.gpu`: a wrong
or absent provider is recorded, and the others are timed.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace

import torch

from bench.cases import FOLDS, Case, Problem, least_bytes, make_problem, operations
from bench.checks.correctness import WrongResultError, check, poisoned_outputs, references
from bench.harness.memory import peak_bytes
from bench.harness.processes import note, one_line, require_device
from bench.harness.records import blank
from bench.harness.timing import Plan, cache_flush, host_seconds, interleave, lead_seconds, median_and_spread, timer_for
from bench.providers.base import Provider, ProviderUnavailableError
from bench.providers.registry import every_provider, is_ours, make_provider, provider_names
from plora_kernels.tuning.lookup import record_blocks

INPUT_SETS = 3
# The status of a provider that is not timed.
WRONG, NOT_AVAILABLE = "wrong", "not available"


@dataclass(frozen=True)
class Measurement:
    """A case's figures by provider: `seconds` of each round, `peak_bytes`, causes of absence.

    `host_seconds` is the host's time per call, on a device that works asynchronously.
    """

    case: Case
    device: str
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]
    not_available: dict[str, str] = field(default_factory=dict)
    host_seconds: dict[str, float] = field(default_factory=dict)

    def entry(self, provider: str) -> dict[str, object]:
        """Return the suites' record of a provider: the facts, its figures and their interquartile range."""
        return _facts(self.case, self.device, provider) | self._figures(provider, "iqr_ms")

    def missing(self, provider: str) -> dict[str, object]:
        """Return the facts and why a provider has no figures."""
        return _facts(self.case, self.device, provider) | {"cause": self.not_available[provider]}

    def record(self, provider: str, *, adapted: bool) -> dict[str, object]:
        """Return the record of a provider in `python -m bench.gpu`'s file; `adapted`: it has an adapter."""
        median_s, base_s = self._median_s(provider), self._median_s("base")
        return blank(
            **_facts(self.case, self.device, provider),
            **self._figures(provider, "spread_ms"),
            base_ms=base_s * 1e3,
            host_us=self.host_seconds[provider] * 1e6 if provider in self.host_seconds else None,
            tflops=operations(self.case, adapted=adapted) / median_s / 1e12,
            gbps=least_bytes(self.case, adapted=adapted) / median_s / 1e9,
            status="timed",
        )

    def _figures(self, provider: str, spread_name: str) -> dict[str, object]:
        median_s, spread_s = median_and_spread(self.seconds[provider])
        return {
            "time_ms": median_s * 1e3,
            spread_name: spread_s * 1e3,
            "rounds": len(self.seconds[provider]),
            "ratio_to_base": median_s / self._median_s("base"),
            "ratio_to_peft": median_s / self._median_s("peft") if "peft" in self.seconds else None,
            "peak_bytes": self.peak_bytes[provider],
        }

    def _median_s(self, provider: str) -> float:
        return statistics.median(self.seconds[provider])


@dataclass
class Exclusions:
    """The providers of a case that are not timed: a status and a cause by name.

    With `strict` only a provider that cannot run on this machine is excluded: every other error is raised.
    """

    device: torch.device
    strict: bool = False
    causes: dict[str, tuple[str, str]] = field(default_factory=dict)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Note which provider runs alone in the body, so that a crash is attributed to it; exclude it if it fails.

        Raises LostProcessError if the device no longer works afterwards.
        """
        note(name)
        try:
            yield
        except ProviderUnavailableError as error:
            self.causes[name] = (NOT_AVAILABLE, str(error))
        except Exception as error:  # a wrong result, out of memory, a kernel that does not compile
            if self.strict:
                raise
            require_device(self.device.type, error)
            self.causes[name] = (WRONG, str(error) if isinstance(error, WrongResultError) else one_line(error))


def measure(case: Case, device: torch.device, plan: Plan) -> Measurement:
    """Measure a case on `device`: check every provider against fp64, read its memory, then time all in turn.

    Raises WrongResultError before anything is timed if one provider's result is wrong. A provider that cannot
    run here is left out, with the cause.
    """
    excluded = Exclusions(device, strict=True)
    providers = right_providers(case, make_problem(case, device), provider_names(case.op), excluded)
    measured = _time(case, device, plan, providers)
    return replace(measured, not_available={name: cause for name, (_, cause) in excluded.causes.items()})


def right_providers(case: Case, problem: Problem, names: Sequence[str], excluded: Exclusions) -> dict[str, Provider]:
    """Return the providers that can be made and are right against fp64; the causes of the others go to `excluded`."""
    return _right(case, problem, _make(case, problem, names, excluded), excluded)


def _make(case: Case, problem: Problem, names: Sequence[str], excluded: Exclusions) -> dict[str, Provider]:
    """Return the providers that can be made."""
    providers = {}
    for name in names:
        with excluded.alone(name):
            providers[name] = make_provider(name, case, problem)
    return providers


def _right(
    case: Case, problem: Problem, providers: Mapping[str, Provider], excluded: Exclusions
) -> dict[str, Provider]:
    """Return the providers whose results are right; outputs of this library are filled with NaN first."""
    for expected in dict.fromkeys(provider.expected for provider in providers.values()):
        note(None)
        exact, plain = references(case, problem, expected)
        for name, provider in providers.items():
            if provider.expected is not expected:
                continue
            with excluded.alone(name), poisoned_outputs() if is_ours(name) else nullcontext():
                # Later calls replay the first one's launches, and those calls are timed.
                results = [provider.results() for _ in range(2)][-1]
                check(name, results, exact, plain)
    return {name: provider for name, provider in providers.items() if name not in excluded.causes}


def _time(
    case: Case, device: torch.device, plan: Plan, providers: Mapping[str, Provider], *, host_ahead: bool = False
) -> Measurement:
    """Read each provider's memory, then time all in turn; on a GPU the host may be kept ahead of the device."""
    steps = {name: provider.step for name, provider in providers.items()}
    peaks, host = {}, {}
    for name, step in steps.items():
        note(name)
        step.reset()
        peaks[name] = peak_bytes(step.run, device)
        if host_ahead and device.type == "cuda":
            host[name] = host_seconds(step)
    note(None)
    flush = cache_flush(device, cold=case.op in FOLDS, lead_s=lead_seconds(host.values()))
    seconds = interleave(steps, timer_for(device), flush, plan)
    return Measurement(case, device.type, seconds, peaks, host_seconds=host)


@dataclass(frozen=True)
class Warmup:
    """A case to build and run once ahead, so that its kernels are in the compilers' caches."""

    case: Case
    device: str
    providers: tuple[str, ...]


def warm_up(work: Warmup) -> dict[str, str]:
    """Build every provider and run it once; return the errors, but for providers that cannot run on this machine.

    Notes each provider's name before it runs.
    """
    device = torch.device(work.device)
    problem = make_problem(work.case, device)
    excluded = Exclusions(device)
    for name in chosen_providers(work.case, work.providers):
        with excluded.alone(name):
            step = make_provider(name, work.case, problem).step
            step.reset()
            step.run()
            if device.type == "cuda":
                torch.cuda.synchronize()
    return {name: cause for name, (status, cause) in excluded.causes.items() if status == WRONG}


def chosen_providers(case: Case, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return an op's providers among the wanted ones, the base always."""
    return tuple(name for name in every_provider(case.op) if name == "base" or name in wanted)


def measure_on_device(
    case: Case, device: torch.device, plan: Plan, wanted: Sequence[str], failed: Mapping[str, str]
) -> list[dict[str, object]]:
    """Return a record per provider of a case; those that are wrong, absent or named in `failed` are not timed.

    Notes each provider's name before it runs alone, and None before what is not one provider's, such as the timing in
    turn. Raises LostProcessError if the device no longer works after one.
    """
    problem = make_problem(case, device, sets=INPUT_SETS if device.type == "cuda" else 1)
    chosen = chosen_providers(case, wanted)
    excluded = Exclusions(device, causes={name: (status_of_lost(name), cause) for name, cause in failed.items()})
    providers = _make(case, problem, [name for name in chosen if name not in failed], excluded)
    blocks = {}
    for name, provider in providers.items():
        if is_ours(name):
            note(name)
            blocks[name] = _blocks(provider)
    providers = _right(case, problem, providers, excluded)
    if "base" not in providers:
        excluded.causes |= dict.fromkeys(providers, (NOT_AVAILABLE, "there was no base to divide by"))
        providers = {}
    records = {name: untimed(case, device.type, name, *why) for name, why in excluded.causes.items()}
    if providers:
        measured = _time(case, device, plan, providers, host_ahead=True)
        records |= {name: measured.record(name, adapted=one.expected.adapted) for name, one in providers.items()}
    return [records[name] | blocks.get(name, {}) for name in chosen]


def status_of_lost(name: str) -> str:
    """Return the status of a provider whose process ended: "wrong" for this library, else "not available"."""
    return WRONG if is_ours(name) else NOT_AVAILABLE


def _blocks(provider: Provider) -> dict[str, object]:
    """Return the blocks, with their design, that a provider's kernels use, by op; none if it fails."""
    with record_blocks() as taken, suppress(Exception):  # the check that follows records the failure
        provider.results()
    return {"blocks": {op: asdict(blocks) for op, blocks in taken.items()}}


def untimed(case: Case, device_type: str, name: str, status: str, cause: str) -> dict[str, object]:
    """Return the record of a provider that was not timed."""
    return blank(**_facts(case, device_type, name), status=status, cause=cause)


def _facts(case: Case, device_type: str, provider: str) -> dict[str, object]:
    return {**case.facts(), "device": device_type, "provider": provider}
