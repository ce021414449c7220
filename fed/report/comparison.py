"""The results of a comparison's finished runs: metrics by variant and seed, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fed.errors import FedError
from fed.experiments import plan as plans
from fed.experiments.plan import Plan
from fed.experiments.variants import Variant
from fed.report.summary import ACCURACY, METRICS, OUTCOME, Metric
from fed.simulation.finished import FINISHED, why_not_finished
from fed.simulation.run_directory import Run, read

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The finished runs of a plan, by the variant's name and the seed, and the number of missing runs."""

    plan: Plan
    runs: dict[str, dict[int, Run]]
    missing: int

    def values(self, variant: Variant, metric: Metric) -> dict[int, float]:
        """Return a metric of a variant's runs by seed, without seeds for which it was not measured."""
        found = {seed: metric.of(run.rows) for seed, run in self.runs[variant.name].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def metrics(self, names: Sequence[str]) -> list[Metric]:
        """Return those of the named metrics that were measured in any run."""
        chosen = [metric for metric in METRICS if metric.name in names]
        return [metric for metric in chosen if any(self.values(variant, metric) for variant in self.plan.variants)]

    def paired(self, variant: Variant, metric: Metric = ACCURACY) -> Interval | None:
        """Return the interval of the variant's metric minus the reference's over common seeds, or None without any."""
        ours, theirs = self.values(variant, metric), self.values(self.plan.reference, metric)
        differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        return interval(differences) if differences else None

    @property
    def others(self) -> list[Variant]:
        """All variants except the reference."""
        return [variant for variant in self.plan.variants if variant != self.plan.reference]


def collect(directory: Path, on_event: Callable[[str], object] | None = None) -> Comparison:
    """Read the finished runs of a comparison; raise FedError if none is finished.

    `on_event` receives a line for each run that ended but is left out, because a file of it was damaged since.
    """
    plan = plans.plan(plans.read(directory))
    runs: dict[str, dict[int, Run]] = {variant.name: {} for variant in plan.variants}
    for cell in plan.cells:
        fault = why_not_finished(directory / cell.path, cell.config)
        try:
            if fault is None:
                runs[cell.variant.name][cell.seed] = read(directory / cell.path)
        except FedError as error:
            fault = str(error)
        if fault is not None and on_event is not None and (directory / cell.path / FINISHED).is_file():
            on_event(f"{cell.label} is left out: {fault}")
    missing = len(plan.cells) - sum(map(len, runs.values()))
    if missing == len(plan.cells):
        raise FedError(f"{str(directory)!r} holds no finished run yet; python -m fed resume {directory} continues it")
    return Comparison(plan, runs, missing)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as values for JSON: shared settings, metrics with mean and deviation, paired differences."""
    plan, metrics = comparison.plan, comparison.metrics([metric.name for metric in METRICS])
    variants = []
    for variant in plan.variants:
        figures = {
            metric.name: {
                "mean": fmean(values.values()),
                "std": stdev(values.values()) if len(values) > 1 else None,
                "by_seed": values,
            }
            for metric in metrics
            if (values := comparison.values(variant, metric))
        }
        variants.append(asdict(variant) | {"figures": figures})
    paired = {
        metric.name: {
            variant.name: {"mean": found.mean, "low": found.low, "high": found.high, "seeds": found.n}
            | {"verdict": found.verdict}
            for variant in comparison.others
            if (found := comparison.paired(variant, metric)) is not None
        }
        for metric in metrics
        if metric.name in OUTCOME
    }
    return {
        "units": {metric.name: metric.unit for metric in metrics},
        "seeds": list(plan.request.seeds),
        "reference": plan.reference.name,
        "missing_runs": comparison.missing,
        "shared_settings": plan.common(),
        "variants": variants,
        "paired_with_reference": paired,
    }


@dataclass(frozen=True)
class Interval:
    """The mean of n paired differences and the ends of its 95 % interval, which are None if n is 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> str:
        """Return "above" or "below", "tie" if the interval contains 0, or "one seed" if there is no interval."""
        if self.low is None or self.high is None:
            return "one seed"
        if self.low <= 0 <= self.high:
            return "tie"
        return "above" if self.low > 0 else "below"


def interval(differences: Sequence[float]) -> Interval:
    """Return the interval d̄ ± t_{0.975, n−1} · s/√n of n ≥ 1 differences with sample standard deviation s.

    >>> round(interval([1.0, 2.0, 3.0]).mean, 3)
    2.0
    """
    from scipy.special import stdtrit

    n, mean = len(differences), fmean(differences)
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)
