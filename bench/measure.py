"""One case measured: results checked, memory read, time taken of every provider in turn."""

import statistics
from dataclasses import dataclass, field

import torch

from bench.cases import FOLDS, Case, Problem, make_problem
from bench.correctness import check, references
from bench.memory import peak_bytes
from bench.provider import Provider, ProviderUnavailableError
from bench.providers import make_provider, provider_names
from bench.timing import Plan, cache_flush, interleave, timer_for


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
