"""Tensors, states and updates as records of Flower's messages, and back.

A message holds one ConfigRecord `facts`, whose `json` is an object of plain values, and ArrayRecords of tensors by
name; a reply moreover holds clients' answers (`fed.flower.answers`).

A tensor is an `Array` of NumPy's bytes; one of bfloat16, which NumPy does not have, holds its bits as uint16 under the
dtype "bfloat16". Nothing that is read runs code, and nothing is allocated that the bytes do not hold.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fed.errors import printable
from fed.methods.low_rank import fold
from fed.simulation.client_store import flat_factors, group, group_factors
from fed.types import Adapter, Client, Options, ServerState, Stack

FACTS = "facts"
WHOLE, ADDED, KNOWN = "whole", "added", "known"
_DTYPES = {
    name: getattr(torch, name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "uint8", "bool")
}
_STYPE = "numpy.ndarray"
_MOST, _MOST_DIMENSIONS = 2**48, 16  # elements of a tensor, and its dimensions


class RecordError(ValueError):
    """What a message lacks or holds that cannot be; the text is a clause such as "its arrays-3 lacks A/fc1"."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message)[:400])


def array_of(value: Tensor) -> Array:
    """Return a tensor, on any device, as an Array."""
    value = value.detach().cpu().contiguous()
    if value.dtype != torch.bfloat16:
        return Array(value.numpy())
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
    content = memoryview(array.data)[stream.tell() :]
    if (
        len(shape) > _MOST_DIMENSIONS
        or any(type(size) is not int or size < 0 for size in shape)
        or math.prod(max(1, size) for size in shape) > _MOST
        or held != dtype
        or (by_column and len(shape) > 1)
        or tuple(array.shape) != shape
        or len(content) != math.prod(shape) * dtype.itemsize
    ):
        raise RecordError(f"its {name} says {array.dtype} {_short(array.shape)}, and its bytes hold something else")
    value = torch.empty(shape, dtype=torch.uint16 if half else _DTYPES[array.dtype])
    if value.numel():
        value.numpy().reshape(-1)[:] = np.frombuffer(content, dtype)
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
