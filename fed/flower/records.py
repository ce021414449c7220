"""Tensors, states and updates as records of Flower's messages, and back.

A message holds one ConfigRecord `facts`, whose `json` is an object of plain values, ArrayRecords of tensors by name,
and for each client's update `arrays-I`, `modules-I` (indices of the trained modules by matrix) and `metrics-I`.

A tensor is an `Array` of NumPy's bytes; one of bfloat16, which NumPy does not have, holds its bits as uint16 under the
dtype "bfloat16". Nothing that is read runs code, and nothing is allocated that the bytes do not hold.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fed.errors import printable
from fed.methods.low_rank import fold
from fed.simulation.client_store import flat_factors, group, group_factors
from fed.types import Adapter, Client, ClientStart, ClientUpdate, Factors, Footprint, Options, ServerState, Stack

FACTS = "facts"
WHOLE, ADDED, KNOWN = "whole", "added", "known"
_DTYPES = {
    name: getattr(torch, name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "uint8", "bool")
}
_STYPE = "numpy.ndarray"


class RecordError(ValueError):
    """What a message lacks or holds that cannot be; the text is a clause such as "its arrays-3 lacks A/fc1"."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message)[:400])


def array_of(value: Tensor) -> Array:
    """Return a tensor, on any device, as an Array."""
    value = value.detach().cpu().contiguous()
    if value.dtype != torch.bfloat16:
        return Array(np.ascontiguousarray(value.numpy()))
    bits = Array(value.view(torch.uint16).numpy())
    return Array("bfloat16", bits.shape, bits.stype, bits.data)


def tensor_of(name: str, array: Any) -> Tensor:
    """Return an Array as a tensor on the CPU; raise RecordError unless its bytes are exactly what it says they are."""
    if not isinstance(array, Array) or array.stype != _STYPE or not isinstance(array.data, bytes):
        raise RecordError(f"its {name} is no array of NumPy's bytes")
    half = array.dtype == "bfloat16"
    dtype = np.dtype("uint16") if half else _dtype(name, array.dtype)
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, held = read(stream)
    except Exception:  # the bytes may be anything, and so may what NumPy's parser of their header raises
        raise RecordError(f"its {name} does not hold NumPy's bytes") from None
    size = math.prod(shape) * dtype.itemsize
    content = array.data[stream.tell() :]
    if held != dtype or (by_column and len(shape) > 1) or tuple(array.shape) != tuple(shape) or len(content) != size:
        raise RecordError(f"its {name} says {array.dtype} {_short(array.shape)}, and its bytes hold something else")
    value = torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy())
    return value.view(torch.bfloat16) if half else value


def _dtype(name: str, dtype: Any) -> np.dtype[Any]:
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise RecordError(f"its {name} is {dtype!r}; one of bfloat16, {', '.join(_DTYPES)} would be right")
    return np.dtype(dtype)


def _short(shape: Any) -> str:
    return str(tuple(shape))[:60]


def arrays_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors by name as a record."""
    return ArrayRecord({name: array_of(value) for name, value in tensors.items()})


def tensors_of(record: Any, title: str) -> dict[str, Tensor]:
    """Return a record's tensors by name; raise RecordError if it is none, or one is not what it says."""
    if not isinstance(record, ArrayRecord):
        raise RecordError(f"it has no arrays {title}")
    return {name: tensor_of(f"{title}/{name}", array) for name, array in record.items()}


def facts_record(facts: Mapping[str, Any]) -> ConfigRecord:
    """Return plain values as a record; numbers that are not finite are kept as they are."""
    return ConfigRecord({"json": json.dumps(facts)})


def facts_of(content: RecordDict, name: str = FACTS) -> dict[str, Any]:
    """Return the plain values of a message; raise RecordError if it has none."""
    record = content.get(name)
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RecordError(f"it has no {name}")
    return found


def server_records(server: ServerState, base: str = WHOLE) -> RecordDict:
    """Return what clients need of the server's state.

    `base` says how they learn what is folded into the base: it is sent `WHOLE`, dense; `ADDED`, as the stacks of
    modules that the last round folded, to a machine that has the rest; or it is `KNOWN` there.
    """
    tensors = flat_factors("adapter", server.adapter.factors)
    kinds = {"head": server.head, "visits": server.visits} | ({"base": server.base_delta} if base == WHOLE else {})
    for kind, named in kinds.items():
        tensors |= {f"{kind}/{name}": value for name, value in named.items()}
    if base == ADDED:
        for matrix, stack in server.fold.items():
            tensors |= {f"added/{field}/{matrix}": value for field, value in stack._asdict().items()}
    adapter = server.adapter
    facts = {
        "round": server.round,
        "scale": adapter.scale,
        "unselected": adapter.unselected,
        "rank": adapter.rank,
        "rank_stabilized": adapter.rank_stabilized,
        "options": vars(server.options),
        "base": base,
    }
    return RecordDict({"server": arrays_of(tensors), "server-facts": facts_record(facts)})


def server_of(content: RecordDict, device: torch.device, base_delta: Mapping[str, Tensor]) -> ServerState:
    """Return the server's state of a message, on a device; `base_delta` is what this machine's base held before."""
    facts = facts_of(content, "server-facts")
    tensors = {
        name: value if name.startswith("visits/") else value.to(device)
        for name, value in tensors_of(content.get("server"), "server").items()
    }
    if facts["base"] == WHOLE:
        base_delta = group(tensors, "base")
    elif facts["base"] == ADDED:
        fields = [group(tensors, f"added/{field}") for field in Stack._fields]
        base_delta = fold(base_delta, {matrix: Stack(*(own[matrix] for own in fields)) for matrix in fields[0]})
    adapter = Adapter(
        group_factors(tensors, "adapter"),
        facts["scale"],
        facts["unselected"],
        facts["rank"],
        facts["rank_stabilized"],
    )
    return ServerState(
        adapter,
        group(tensors, "head"),
        round=facts["round"],
        base_delta=base_delta,
        visits=group(tensors, "visits"),
        options=Options(**facts["options"]),
    )


def client_tensors(client: Client) -> dict[str, Tensor]:
    """Return what a client keeps between rounds, by name, as its method and its head need it."""
    memory = {f"memory/{name}": value for name, value in client.memory.items()}
    return memory | {f"head/{name}": value for name, value in client.head.items()}


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
    kinds = {"head": update.head, "memory": update.memory, "gradients": answer.gradients}
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
    known = ("A/", "B/", "head/", "memory/", "gradients/")
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
        str(modules.get("sent")),
        group(tensors, "memory"),
        footprint,
        figures.whole("tokens"),
        figures.whole("positions"),
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
        if isinstance(value, bool) or not isinstance(value, int | float) or (finite and not _is_size(value)):
            raise RecordError(
                f"its {self._title} has {name} = {str(value)[:40]}; a number of at least 0 would be right"
            )
        return float(value)

    def whole(self, name: str) -> int:
        value = self._metrics.get(name)
        if type(value) is not int or value < 0:
            raise RecordError(f"its {self._title} has {name} = {str(value)[:40]}; a whole number would be right")
        return value


def _is_size(value: float) -> bool:
    return math.isfinite(value) and value >= 0
