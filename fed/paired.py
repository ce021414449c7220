"""What differences by seed say: their mean, its 95 % interval, and whether that is a difference at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


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
    """Return d̄ ± t_{0.975, n−1} · s/√n of n ≥ 1 differences, s their sample standard deviation."""
    from scipy.special import stdtrit

    n, mean = len(differences), fmean(differences)
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)
