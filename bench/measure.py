"""One case measured: every provider checked, weighed and timed in turn.

`measure` is for the suites and raises where a result is wrong; `measure_on_device` is for `python -m bench.gpu`, which
records what is wrong or absent and goes on.
"""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field

import torch

from bench.cases import FOLDS, Case, Problem, least_bytes, make_problem, operations
from bench.checks.correctness import WrongResultError, check, poisoned_outputs, references
from bench.harness.device_health import require_device
from bench.harness.memory import peak_bytes
from bench.harness.processes import note, one_line
from bench.harness.records import blank
from bench.harness.timing import Plan, cache_flush, host_seconds, interleave, timer_for
from bench.providers.base import Provider, ProviderUnavailableError
from bench.providers.registry import every_provider, is_ours, make_provider, provider_names
from plora_kernels.tuning.lookup import record_blocks

INPUT_SETS = 3
# Longer than the slowest call keeps the host, by this factor and this much.
LEAD_FACTOR, LEAD_SECONDS = 1.5, 100e-6


@dataclass(frozen=True)
class Measurement:
    """A case's figures by provider: `seconds` of each round, `peak_bytes`, causes of absence."""

    case: Case
    device: str
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]
    not_available: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, object]:
        """Return what was measured, as the saved JSON names it."""
        return {**self.case.facts(), "device": self.device}

    def entry(self, provider: str) -> dict[str, object]:
        """Return the facts and one provider's median and interquartile range, ratios, peak bytes."""
        time_ms = self._median_ms(provider)
        first, _, third = statistics.quantiles(self.seconds[provider], n=4, method="inclusive")
        return {
            **self.facts(),
            "provider": provider,
            "time_ms": time_ms,
            "iqr_ms": (third - first) * 1e3,
            "rounds": len(self.seconds[provider]),
            "ratio_to_base": time_ms / self._median_ms("base"),
            "ratio_to_peft": time_ms / self._median_ms("peft"),
            "peak_bytes": self.peak_bytes[provider],
        }

    def missing(self, provider: str) -> dict[str, object]:
        """Return the facts and why a provider has no figures."""
        return {**self.facts(), "provider": provider, "cause": self.not_available[provider]}

    def _median_ms(self, provider: str) -> float:
        return statistics.median(self.seconds[provider]) * 1e3


def measure(case: Case, device: torch.device, plan: Plan) -> Measurement:
    """Measure a case on `device`: check every provider against fp64, read its memory, then time all in turn.

    Raises WrongResultError before anything is timed if one provider's result is wrong. A provider that cannot
    run here is left out and its cause kept.
    """
    problem = make_problem(case, device)
    providers, not_available = _make_providers(case, problem)
    _check_all(case, problem, providers)
    peaks = {}
    for name, provider in providers.items():
        provider.step.reset()
        peaks[name] = peak_bytes(provider.step.run, device)
    seconds = interleave(
        {name: provider.step for name, provider in providers.items()},
        timer_for(device),
        cache_flush(device, cold=case.op in FOLDS),
        plan,
    )
    return Measurement(case, device.type, seconds, peaks, not_available)


def _make_providers(case: Case, problem: Problem) -> tuple[dict[str, Provider], dict[str, str]]:
    providers, not_available = {}, {}
    for name in provider_names(case.op):
        try:
            providers[name] = make_provider(name, case, problem)
        except ProviderUnavailableError as error:
            not_available[name] = str(error)
    return providers, not_available


def _check_all(case: Case, problem: Problem, providers: dict[str, Provider]) -> None:
    for expected in dict.fromkeys(provider.expected for provider in providers.values()):
        exact, plain = references(case, problem, expected)
        for name, provider in providers.items():
            if provider.expected is expected:
                check(name, provider.results(), exact, plain)


@dataclass(frozen=True)
class Warmup:
    """A case to build and run once ahead, so that what it compiles lies in the compilers' caches."""

    case: Case
    device: str
    providers: tuple[str, ...]


def warm_up(work: Warmup) -> dict[str, str]:
    """Build every provider and run it once; return the causes of those that fail for another reason than absence.

    Notes each provider's name before it runs.
    """
    device = torch.device(work.device)
    problem = make_problem(work.case, device)
    failed = {}
    for name in chosen_providers(work.case, work.providers):
        note(name)
        try:
            provider = make_provider(name, work.case, problem)
            provider.step.reset()
            provider.step.run()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except ProviderUnavailableError:
            continue
        except Exception as error:  # a finding about the provider, whatever it is
            require_device(work.device, error)
            failed[name] = one_line(error)
    return failed


def chosen_providers(case: Case, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return an op's providers among the wanted ones, the base always."""
    return tuple(name for name in every_provider(case.op) if name == "base" or name in wanted)


def measure_on_device(
    case: Case, device: torch.device, plan: Plan, wanted: Sequence[str], failed: Mapping[str, str]
) -> list[dict[str, object]]:
    """Return a record per provider of a case; what is wrong, absent or named in `failed` is recorded and not timed.

    Notes each provider's name before it runs alone, and None before what is nobody's own, the timing in turn above all.
    Raises LostProcessError if one leaves a device that does no more work.
    """
    problem = make_problem(case, device, sets=INPUT_SETS if device.type == "cuda" else 1)
    chosen = chosen_providers(case, wanted)
    # Ours are wrong where their process ends; of the others nothing is known.
    causes = {name: ("wrong" if is_ours(name) else "not available", cause) for name, cause in failed.items()}
    providers: dict[str, Provider] = {}
    for name in chosen:
        if name in causes:
            continue
        note(name)
        try:
            providers[name] = make_provider(name, case, problem)
        except ProviderUnavailableError as error:
            causes[name] = ("not available", str(error))
        except Exception as error:  # out of memory, a kernel that does not compile
            require_device(device.type, error)
            causes[name] = ("wrong", one_line(error))
    blocks = {}
    for name, provider in providers.items():
        if is_ours(name):
            note(name)
            blocks[name] = _blocks(provider)
    for name, cause in _wrong(case, problem, providers).items():
        causes[name] = ("wrong", cause)
        del providers[name]
    if "base" not in providers:
        causes |= dict.fromkeys(providers, ("not available", "there was no base to divide by"))
        providers = {}
    records = {name: untimed(case, device.type, name, *cause) for name, cause in causes.items()}
    if providers:
        records |= _time(case, device, plan, providers)
    return [records[name] | blocks.get(name, {}) for name in chosen]


def _blocks(provider: Provider) -> dict[str, object]:
    """Return the blocks, designs among them, that a provider's kernels take, by op; none where it fails."""
    with record_blocks() as taken, suppress(Exception):  # what fails here is found wrong next
        provider.results()
    return {"blocks": {op: asdict(blocks) for op, blocks in taken.items()}}


def _wrong(case: Case, problem: Problem, providers: Mapping[str, Provider]) -> dict[str, str]:
    """Return why each provider is wrong that is, its outputs poisoned before it runs."""
    found = {}
    for expected in dict.fromkeys(provider.expected for provider in providers.values()):
        note(None)
        exact, plain = references(case, problem, expected)
        for name, provider in providers.items():
            if provider.expected is not expected:
                continue
            note(name)
            try:
                with poisoned_outputs() if is_ours(name) else nullcontext():
                    # Calls after the first replay what it recorded: it is those that are timed.
                    results = [provider.results() for _ in range(2)][-1]
                check(name, results, exact, plain)
            except WrongResultError as error:
                found[name] = str(error)
            except Exception as error:  # a provider that fails while it runs is not timed either
                require_device(problem.x.device.type, error)
                found[name] = one_line(error)
    return found


def _time(case: Case, device: torch.device, plan: Plan, providers: Mapping[str, Provider]) -> dict[str, dict]:
    steps = {name: provider.step for name, provider in providers.items()}
    peaks, host = {}, {}
    for name, step in steps.items():
        note(name)
        step.reset()
        peaks[name] = peak_bytes(step.run, device)
        if device.type == "cuda":
            host[name] = host_seconds(step)
    lead_s = LEAD_FACTOR * max(host.values()) + LEAD_SECONDS if host else 0.0
    note(None)
    flush = cache_flush(device, cold=case.op in FOLDS, lead_s=lead_s)
    seconds = interleave(steps, timer_for(device), flush, plan)
    medians = {name: statistics.median(durations) for name, durations in seconds.items()}
    records = {}
    for name, durations in seconds.items():
        first, _, third = statistics.quantiles(durations, n=4, method="inclusive")
        adapted = providers[name].expected.adapted
        records[name] = _facts(case, device.type, name) | {
            "time_ms": medians[name] * 1e3,
            "spread_ms": (third - first) * 1e3,
            "rounds": len(durations),
            "base_ms": medians["base"] * 1e3,
            "ratio_to_base": medians[name] / medians["base"],
            "ratio_to_peft": medians[name] / medians["peft"] if "peft" in medians else None,
            "host_us": host[name] * 1e6 if name in host else None,
            "peak_bytes": peaks[name],
            "tflops": operations(case, adapted=adapted) / medians[name] / 1e12,
            "gbps": least_bytes(case, adapted=adapted) / medians[name] / 1e9,
            "status": "timed",
        }
    return records


def untimed(case: Case, device_type: str, name: str, status: str, cause: str) -> dict[str, object]:
    """Return the record of a provider that was not timed."""
    return _facts(case, device_type, name) | {"status": status, "cause": cause}


def _facts(case: Case, device_type: str, provider: str) -> dict[str, object]:
    return blank(**case.facts(), device=device_type, provider=provider)
