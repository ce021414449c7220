"""ε of a run's rounds, and the noise for a wished-for ε, by the library dp-accounting (extra `privacy`).

Neighbouring runs differ in all data of one client, in place of which another client's stand ("replace one"), so the
number of clients is public. Rényi DP is composed over the rounds and converted to (ε, δ).

Source: Mironov, "Rényi Differential Privacy", CSF 2017; Wang, Balle, Kasiviswanathan, "Subsampled Rényi Differential
Privacy and Analytical Moments Accountant", AISTATS 2019, arXiv 1808.00087 (sampling without replacement).
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from fed.errors import FedError

MOST_NOISE = 1e6  # multiplier, up to which noise for an ε is looked for


def require_accounting() -> None:
    """Raise FedError, naming the extra, if dp-accounting is not installed."""
    _library()


@cache
def epsilon(sensitivity_ratio: float, rounds: int, delta: float, clients: int, per_round: int) -> float:
    """Return ε at `delta` after so many rounds of the Gaussian mechanism; 0 before the first.

    `sensitivity_ratio` is the noise's standard deviation over the sensitivity of what it is added to. In every round
    `per_round` of `clients` are drawn without replacement, in secret; with `per_round` = `clients` there is no drawing.
    """
    if rounds == 0:
        return 0.0
    accounting = _library()
    accountant = accounting.rdp.RdpAccountant(neighboring_relation=accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(_event(sensitivity_ratio, clients, per_round), rounds)
    return float(accountant.get_epsilon(delta))


@cache
def ratio_for(target_epsilon: float, rounds: int, delta: float, clients: int, per_round: int) -> float:
    """Return the least ratio, to a thousandth, with which `epsilon` of so many rounds is at most the target.

    Raises FedError if there is none up to `MOST_NOISE`.
    """
    if epsilon(MOST_NOISE, rounds, delta, clients, per_round) > target_epsilon:
        raise FedError(f"privacy.target_epsilon is {target_epsilon:g}: no noise gives it; a larger one would be right")
    low, high = 0.0, 1.0
    while epsilon(high, rounds, delta, clients, per_round) > target_epsilon:
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (
            (low, middle) if epsilon(middle, rounds, delta, clients, per_round) <= target_epsilon else (middle, high)
        )
    return high


def _event(sensitivity_ratio: float, clients: int, per_round: int) -> Any:
    accounting = _library()
    gaussian = accounting.GaussianDpEvent(sensitivity_ratio)
    if per_round == clients:
        return gaussian
    return accounting.SampledWithoutReplacementDpEvent(clients, per_round, gaussian)


def _library() -> Any:
    try:
        return importlib.import_module("dp_accounting")
    except ModuleNotFoundError as error:
        raise FedError(
            f"privacy.clip is set, and {error.name} is not installed; pip install 'plora-kernels[privacy]' would "
            "be right"
        ) from None
