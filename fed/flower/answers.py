"""What a client's machine answers, as records of a reply: `arrays-I`, `modules-I` and `metrics-I`, or `fault-I`.

`modules-I` holds the indices of the trained modules by matrix. What a client keeps is not sent: its method says what
that is (`fed.methods.Method.finish`), so the server knows it, or has no use for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fed.errors import printable
from fed.flower.records import RecordError, arrays_of, tensors_of
from fed.simulation.client_store import group
from fed.types import Client, ClientStart, ClientUpdate, Factors, Footprint

LARGEST = 2**62  # of the numbers that machines measure, so that sums over clients stay finite


@dataclass(frozen=True)
class Answer:
    """A client's part of a reply: its update, and what its machine measured.

    `noise` is its initialisation noise, `factor_noise` the distances of A and of B from those it ended with before.
    `fault` says why there is no update, for example for want of memory.
    """

    update: ClientUpdate | None
    noise: float | None = None
    factor_noise: tuple[float, float] | None = None
    fold_seconds: float = 0.0
    train_seconds: float = 0.0
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    fault: str | None = None


def answer_records(client: int, answer: Answer, sides: str = "AB") -> dict[str, Any]:
    """Return a client's answer as records of a reply; of its factors only `sides`, which it trained, are sent."""
    update = answer.update
    if update is None:
        return {f"fault-{client}": ConfigRecord({"fault": answer.fault or "it gave no reason"})}
    tensors = {f"{side}/{matrix}": pair["AB".index(side)] for matrix, pair in update.factors.items() for side in sides}
    kinds = {"head": update.head, "gradients": answer.gradients}
    for kind, named in kinds.items():
        tensors |= {f"{kind}/{name}": value for name, value in named.items()}
    metrics: dict[str, Any] = {
        "weight": float(update.weight),
        "steps": update.steps,
        "loss": float(update.loss),
        "tokens": update.tokens,
        "positions": update.positions,
        "fold_seconds": answer.fold_seconds,
        "train_seconds": answer.train_seconds,
    }
    if update.footprint is not None:
        metrics |= update.footprint._asdict()
    if answer.noise is not None:
        metrics["init_noise"] = answer.noise
    if answer.factor_noise is not None:
        metrics["factor_noise_A"], metrics["factor_noise_B"] = answer.factor_noise
    modules = {matrix: list(chosen) for matrix, chosen in update.selected.items()}
    return {
        f"arrays-{client}": arrays_of(tensors),
        f"modules-{client}": ConfigRecord(
            {"sent": update.sent, **{f"of {name}": own for name, own in modules.items()}}
        ),
        f"metrics-{client}": MetricRecord(metrics),
    }


def answer_of(content: RecordDict, client: Client, device: torch.device, sides: str = "AB") -> Answer:
    """Return a client's answer in a reply; raise RecordError if it is not whole.

    A factor that is not in `sides`, which the client trained, is empty, for `with_fixed` to fill in.

    Whether the update fits what the client was sent is for `fed.simulation.update_checks.find_fault` to say.
    """
    number = client.id
    refused = content.get(f"fault-{number}")
    if refused is not None:
        fault = refused.get("fault") if isinstance(refused, ConfigRecord) else None
        return Answer(None, fault=printable(str(fault))[:400])
    arrays, modules, metrics = (content.get(f"{kind}-{number}") for kind in ("arrays", "modules", "metrics"))
    tensors = {name: own.to(device) for name, own in tensors_of(arrays, f"arrays-{number}").items()}
    if not isinstance(modules, ConfigRecord) or not isinstance(metrics, MetricRecord):
        raise RecordError(f"it has no modules-{number} or no metrics-{number}")
    known = ("A/", "B/", "head/", "gradients/")
    if extra := [name for name in tensors if not name.startswith(known)]:
        raise RecordError(f"its arrays-{number} holds {extra[0]!r}, which was not asked for")
    factors = _factors(tensors, number, sides)
    figures = _Figures(metrics, f"metrics-{number}")
    footprint = None
    if "trainable_parameters" in metrics:
        footprint = Footprint(*(figures.whole(name) for name in Footprint._fields))
    moved = None
    if "factor_noise_A" in metrics:
        moved = figures.number("factor_noise_A"), figures.number("factor_noise_B")
    update = ClientUpdate(
        client,
        factors,
        {name.removeprefix("of "): _indices(own) for name, own in modules.items() if name.startswith("of ")},
        group(tensors, "head"),
        figures.number("weight"),
        figures.whole("steps"),
        figures.number("loss", finite=False),
        str(modules.get("sent"))[:80],
        footprint=footprint,
        tokens=figures.whole("tokens"),
        positions=figures.whole("positions"),
    )
    return Answer(
        update,
        figures.number("init_noise") if "init_noise" in metrics else None,
        moved,
        figures.number("fold_seconds"),
        figures.number("train_seconds"),
        group(tensors, "gradients"),
    )


def with_fixed(update: ClientUpdate, start: ClientStart) -> ClientUpdate:
    """Return an update with the factors that its client did not train, which are those of its start.

    Whatever does not fit the start is left as it is, for the checks of updates to name.
    """
    if start.trained == "AB":
        return update
    factors = dict(update.factors)
    for matrix, pair in update.factors.items():
        if matrix not in start.factors or update.selected.get(matrix) != start.selected[matrix]:
            continue
        chosen = list(start.selected[matrix])
        A, B = start.factors[matrix]
        fixed = A[chosen], B[:, chosen]
        factors[matrix] = (pair[0] if "A" in start.trained else fixed[0], pair[1] if "B" in start.trained else fixed[1])
    return replace(update, factors=factors)


def _factors(tensors: Mapping[str, Tensor], number: int, sides: str) -> dict[str, Factors]:
    found = {side: group(tensors, side) for side in "AB"}
    if extra := [side for side in "AB" if side not in sides and found[side]]:
        raise RecordError(f"its arrays-{number} holds {extra[0]}/{next(iter(found[extra[0]]))}, which it did not train")
    names = {name for side in sides for name in found[side]}
    for matrix in sorted(names):
        if lacking := [side for side in sides if matrix not in found[side]]:
            raise RecordError(f"its arrays-{number} lacks {lacking[0]}/{matrix}")
    nothing = torch.empty(0)
    return {matrix: (found["A"].get(matrix, nothing), found["B"].get(matrix, nothing)) for matrix in sorted(names)}


def _indices(found: Any) -> Any:
    """Return module indices as a tuple; anything else as it is, for the checks to name."""
    return tuple(found) if isinstance(found, list) else found


class _Figures:
    """The numbers of a client's metrics, each checked as it is read."""

    def __init__(self, metrics: MetricRecord, title: str) -> None:
        self._metrics, self._title = metrics, title

    def number(self, name: str, finite: bool = True) -> float:
        value = self._metrics.get(name)
        if type(value) not in (int, float) or ((type(value) is int or finite) and not 0 <= value <= LARGEST):
            raise RecordError(f"its {self._title} has {name} = {_short(value)}; a number of at least 0 would be right")
        return float(value)

    def whole(self, name: str) -> int:
        value = self._metrics.get(name)
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise RecordError(f"its {self._title} has {name} = {_short(value)}; a whole number would be right")
        return value


def _short(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, int | float) else f"a {type(value).__name__}"
