"""The metrics that summarise a run, each one number computed from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from fed.types import Row, measured


def _last(rows: Sequence[Row], field: str) -> float | None:
    return measured(rows[-1], field)


def _mean(rows: Sequence[Row], field: str) -> float | None:
    """Return the mean over all rounds except round 0, in which nothing is trained."""
    values = _known(rows[1:], field)
    return fmean(values) if values else None


def _sum(rows: Sequence[Row], field: str) -> float | None:
    values = _known(rows, field)
    return sum(values) if values else None


def _most(rows: Sequence[Row], field: str) -> float | None:
    return max(_known(rows, field), default=None)


def _gain(rows: Sequence[Row], field: str) -> float | None:
    first, last = measured(rows[0], field), measured(rows[-1], field)
    return None if first is None or last is None else float(last - first)


def _count(rows: Sequence[Row], field: str) -> float | None:
    """Return the length of all lists of a field together, or None if there is nothing in them."""
    return float(sum(len(measured(row, field) or ()) for row in rows)) or None


def _known(rows: Sequence[Row], field: str) -> list[float]:
    return [value for row in rows if (value := measured(row, field)) is not None]


class Metric(NamedTuple):
    """One metric of a run: `over` computes it from a field of the rows, and `scale` converts it to `unit`.

    `title` is the heading of its column in tables, and `phrase` the title of its panel in figures. `digits` is the
    number of decimals shown; None stands for three significant digits.
    """

    name: str
    title: str
    unit: str
    over: Callable[[Sequence[Row], str], float | None]
    field: str
    scale: float = 1.0
    digits: int | None = None
    phrase: str = ""

    def of(self, rows: Sequence[Row]) -> float | None:
        """Return the metric of a run with these rows, or None if it was not measured."""
        value = self.over(rows, self.field)
        return None if value is None else self.scale * value


ACCURACY = Metric("accuracy", "accuracy", "%", _last, "accuracy", 100.0, digits=1)
ROUGE = Metric("rouge_l", "ROUGE-L", "%", _last, "rouge_l", 100.0, digits=1)
METRICS = (
    ACCURACY,
    Metric("gain", "gain", "points", _gain, "accuracy", 100.0, digits=1),
    Metric("rouge_1", "ROUGE-1", "%", _last, "rouge_1", 100.0, digits=1),
    ROUGE,
    Metric("worst_accuracy", "worst client", "%", _last, "worst_accuracy", 100.0, digits=1),
    Metric("loss", "loss", "", _last, "loss", digits=3),
    Metric("init_noise", "initialisation noise", "", _mean, "init_noise"),
    Metric("agg_noise", "aggregation noise", "", _mean, "agg_noise"),
    Metric("agg_noise_module", "module noise", "", _mean, "agg_noise_module"),
    Metric("factor_noise", "factor noise", "", _mean, "factor_noise"),
    Metric("upload_mb", "up", "MB", _sum, "upload_bytes", 1e-6, phrase="Sent up in a whole run"),
    Metric("download_mb", "down", "MB", _sum, "download_bytes", 1e-6, phrase="Sent down in a whole run"),
    Metric("trainable_parameters", "trainable", "", _mean, "trainable_parameters", phrase="Trainable parameters"),
    Metric("optimizer_mb", "optimiser", "MB", _most, "optimizer_bytes", 1e-6, phrase="Optimiser state, at most"),
    Metric("activation_mb", "activations", "MB", _most, "activation_bytes", 1e-6, phrase="Activations kept, at most"),
    Metric("train_seconds", "training", "s", _sum, "train_seconds", phrase="Local training in a whole run"),
    Metric("tokens_per_second", "tokens/s", "", _mean, "tokens_per_second", phrase="Tokens trained on in a second"),
    Metric("padding_share", "padding", "%", _mean, "padding_share", 100.0, digits=1, phrase="Padding in training"),
    Metric("fold_seconds", "folding", "s", _sum, "fold_seconds"),
    Metric("left_out", "left out", "", _count, "skipped", digits=0, phrase="Updates left out in a whole run"),
    Metric("clipped", "clipped", "", _count, "clipped", digits=0, phrase="Updates clipped in a whole run"),
)
OUTCOME = ("accuracy", "gain", "rouge_1", "rouge_l", "worst_accuracy", "loss")
# Metrics that variants are compared by; they are in per cent, and higher is better.
SCORES = (ACCURACY, ROUGE)
NOISE = ("init_noise", "agg_noise", "agg_noise_module", "factor_noise")
COST = (
    *("upload_mb", "download_mb", "trainable_parameters", "optimizer_mb", "activation_mb", "train_seconds"),
    *("tokens_per_second", "padding_share", "left_out", "clipped"),
)
