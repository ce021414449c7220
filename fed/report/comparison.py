"""A comparison's finished runs, read: figures by variant and seed, differences paired by seed, their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fed.errors import FedError
from fed.experiments import plan as plans
from fed.experiments.plan import Plan
from fed.experiments.runner import finished
from fed.experiments.variants import Variant
from fed.report.summary import ACCURACY, METRICS, OUTCOME, Metric
from fed.simulation.run_directory import Run, read

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The finished runs of a plan: variant's name and seed to run."""

    plan: Plan
    runs: dict[str, dict[int, Run]]
    missing: int

    def values(self, variant: Variant, metric: Metric) -> dict[int, float]:
        """Return a figure of a variant's runs, by seed; seeds where it was not measured are left out."""
        found = {seed: metric.of(run.rows) for seed, run in self.runs[variant.name].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def metrics(self, names: Sequence[str]) -> list[Metric]:
        """Return those of the named metrics that any run has."""
        chosen = [metric for metric in METRICS if metric.name in names]
        return [metric for metric in chosen if any(self.values(variant, metric) for variant in self.plan.variants)]

    def paired(self, variant: Variant, metric: Metric = ACCURACY) -> Interval | None:
        """Return the variant's figure less the reference's, over the seeds both have; None where there are none."""
        ours, theirs = self.values(variant, metric), self.values(self.plan.reference, metric)
        differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        return interval(differences) if differences else None

    @property
    def others(self) -> list[Variant]:
        """Every variant but the reference."""
        return [variant for variant in self.plan.variants if variant != self.plan.reference]


def collect(directory: Path) -> Comparison:
    """Read a comparison's finished runs; FedError where none is finished."""
    plan = plans.plan(plans.read(directory))
    runs: dict[str, dict[int, Run]] = {variant.name: {} for variant in plan.variants}
    missing = 0
    for cell in plan.cells:
        if finished(cell, directory):
            runs[cell.variant.name][cell.seed] = read(directory / cell.path)
        else:
            missing += 1
    if missing == len(plan.cells):
        raise FedError(f"{str(directory)!r} holds no finished run yet; python -m fed resume {directory} continues it")
    return Comparison(plan, runs, missing)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as plain values: settings shared, figures of each run, mean and deviation, differences."""
    plan, metrics = comparison.plan, comparison.metrics([metric.name for metric in METRICS])
    variants = []
    for variant in plan.variants:
        by_metric = {metric.name: comparison.values(variant, metric) for metric in metrics}
        figures = {
            name: {
                "mean": fmean(values.values()),
                "std": stdev(values.values()) if len(values) > 1 else None,
                "by_seed": {str(seed): value for seed, value in values.items()},
            }
            for name, values in by_metric.items()
            if values
        }
        variants.append(
            {
                "name": variant.name,
                "label": variant.label,
                "settings": list(variant.settings),
                "notes": list(variant.notes),
                "figures": figures,
            }
        )
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
    """The mean of n paired differences and the ends of its 95 % interval, None where one seed gives none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> str:
        """Return "above", "below", or "tie" where 0 lies inside the interval; "one seed" where there is none."""
        if self.low is None or self.high is None:
            return "one seed"
        if self.low <= 0 <= self.high:
            return "tie"
        return "above" if self.low > 0 else "below"


def interval(differences: Sequence[float]) -> Interval:
    """Return d̄ ± t_{0.975, n−1} · s/√n of n ≥ 1 differences, s their sample standard deviation.

    >>> round(interval([1.0, 2.0, 3.0]).mean, 3)
    2.0
    """
    from scipy.special import stdtrit

    n, mean = len(differences), fmean(differences)
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)
