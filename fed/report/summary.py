"""The metrics that summarise a run, each one number computed from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from fed.types import Row, measured


class Metric(NamedTuple):
    """One metric of a run: `of` computes it from the rows, or returns None if it was not measured.

    `title` is the heading of its column in tables, and `phrase` the title of its panel in figures. `digits` is the
    number of decimals shown; None stands for three significant digits.
    """

    name: str
    title: str
    unit: str
    of: Callable[[Sequence[Row]], float | None]
    digits: int | None = None
    phrase: str = ""


def _last(rows: Sequence[Row], field: str, scale: float = 1.0) -> float | None:
    value = measured(rows[-1], field)
    return None if value is None else scale * value


def _mean(rows: Sequence[Row], field: str) -> float | None:
    """Return the mean over all rounds except round 0, in which nothing is trained."""
    values = [value for row in rows[1:] if (value := measured(row, field)) is not None]
    return fmean(values) if values else None


def _sum(rows: Sequence[Row], field: str, scale: float = 1.0) -> float | None:
    values = [value for row in rows if (value := measured(row, field)) is not None]
    return scale * sum(values) if values else None


def _most(rows: Sequence[Row], field: str, scale: float = 1.0) -> float | None:
    values = [value for row in rows if (value := measured(row, field)) is not None]
    return scale * max(values) if values else None


def _gain(rows: Sequence[Row]) -> float:
    return 100 * float(rows[-1]["accuracy"] - rows[0]["accuracy"])


ACCURACY = Metric("accuracy", "accuracy", "%", partial(_last, field="accuracy", scale=100.0), 1)
ROUGE = Metric("rouge_l", "ROUGE-L", "%", partial(_last, field="rouge_l", scale=100.0), 1)
METRICS = (
    ACCURACY,
    Metric("gain", "gain", "points", _gain, 1),
    Metric("rouge_1", "ROUGE-1", "%", partial(_last, field="rouge_1", scale=100.0), 1),
    ROUGE,
    Metric("worst_accuracy", "worst client", "%", partial(_last, field="worst_accuracy", scale=100.0), 1),
    Metric("loss", "loss", "", partial(_last, field="loss"), 3),
    Metric("init_noise", "initialisation noise", "", partial(_mean, field="init_noise")),
    Metric("agg_noise", "aggregation noise", "", partial(_mean, field="agg_noise")),
    Metric("agg_noise_module", "module noise", "", partial(_mean, field="agg_noise_module")),
    Metric("factor_noise", "factor noise", "", partial(_mean, field="factor_noise")),
    Metric("upload_mb", "up", "MB", partial(_sum, field="upload_bytes", scale=1e-6), phrase="Sent up in a whole run"),
    Metric(
        "download_mb",
        "down",
        "MB",
        partial(_sum, field="download_bytes", scale=1e-6),
        phrase="Sent down in a whole run",
    ),
    Metric(
        "trainable_parameters",
        "trainable",
        "",
        partial(_mean, field="trainable_parameters"),
        phrase="Trainable parameters",
    ),
    Metric(
        "optimizer_mb",
        "optimiser",
        "MB",
        partial(_most, field="optimizer_bytes", scale=1e-6),
        phrase="Optimiser state, at most",
    ),
    Metric(
        "activation_mb",
        "activations",
        "MB",
        partial(_most, field="activation_bytes", scale=1e-6),
        phrase="Activations kept, at most",
    ),
    Metric(
        "train_seconds", "training", "s", partial(_sum, field="train_seconds"), phrase="Local training in a whole run"
    ),
    Metric("fold_seconds", "folding", "s", partial(_sum, field="fold_seconds")),
)
OUTCOME = ("accuracy", "gain", "rouge_1", "rouge_l", "worst_accuracy", "loss")
# Metrics that variants are compared by; they are in per cent, and higher is better.
SCORES = (ACCURACY, ROUGE)
NOISE = ("init_noise", "agg_noise", "agg_noise_module", "factor_noise")
COST = ("upload_mb", "download_mb", "trainable_parameters", "optimizer_mb", "activation_mb", "train_seconds")
