"""The tensors of a message in a few arrays, because Flower sends every array by itself.

That takes some milliseconds each, on every one of the three ways from the process that trains to the server's; a client
has dozens of tensors, and a machine answers for many clients. In a bundled message the ArrayRecord `bundle` holds an
array of one dimension for each dtype, and the ConfigRecord `layout` says which tensors are in them, in order: its
`json` is an object of records, each an object of tensors by name, each `[dtype, shape]`, or null for a large tensor,
which stays an array of its own record.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fed.flower.records import RecordError, array_of, facts_of, facts_record, tensor_of

BUNDLE, LAYOUT = "bundle", "layout"
LARGE_BYTES = 2**20  # from which on an array is sent by itself: its bytes take longer than its requests


def bundled(content: RecordDict) -> RecordDict:
    """Return a message with its tensors bundled; `unbundled` is the inverse.

    >>> from fed.flower.records import arrays_of
    >>> content = RecordDict({"own": arrays_of({"A": torch.ones(2, 3), "B": torch.zeros(3, 2)})})
    >>> {name: array.shape for name, array in bundled(content)["bundle"].items()}
    {'float32': (12,)}
    """
    layout: dict[str, dict[str, Any]] = {}
    parts: dict[str, list[Tensor]] = {}
    others = RecordDict()
    for title, record in content.items():
        if not isinstance(record, ArrayRecord):
            others[title] = record
            continue
        apart, layout[title] = ArrayRecord(), {}
        for name, array in record.items():
            if len(array.data) >= LARGE_BYTES:
                apart[name], layout[title][name] = array, None
            else:
                parts.setdefault(array.dtype, []).append(tensor_of(f"{title}/{name}", array).reshape(-1))
                layout[title][name] = [array.dtype, list(array.shape)]
        if apart:
            others[title] = apart
    if layout:
        others[BUNDLE] = ArrayRecord({dtype: array_of(torch.cat(own)) for dtype, own in parts.items()})
        others[LAYOUT] = facts_record(layout)
    return others


def unbundled(content: RecordDict, most: int | None = None) -> RecordDict:
    """Return a message with an ArrayRecord for each of the layout's; a message without a layout as it is.

    Raises RecordError if the layout is not that of the bundle, to the last number, or has more than `most` tensors: an
    empty one costs its sender next to nothing.
    """
    if LAYOUT not in content:
        return content
    layout, bundle = facts_of(content, LAYOUT), content.get(BUNDLE)
    count = sum(len(tensors) for tensors in layout.values() if isinstance(tensors, dict))
    if most is not None and count > most:
        raise RecordError(f"its {LAYOUT} has {count} tensors; at most {most} were asked for")
    if not isinstance(bundle, ArrayRecord):
        raise RecordError(f"it has a {LAYOUT} and no arrays {BUNDLE}")
    flat = {dtype: tensor_of(f"{BUNDLE}/{dtype}", array) for dtype, array in bundle.items()}
    if wrong := [dtype for dtype, own in flat.items() if own.dim() != 1 or bundle[dtype].dtype != dtype]:
        raise RecordError(f"its {BUNDLE}/{wrong[0]} is not the numbers of tensors of this dtype")
    taken = dict.fromkeys(flat, 0)
    found = RecordDict({name: record for name, record in content.items() if name not in (BUNDLE, LAYOUT)})
    for title, tensors in layout.items():
        apart = found.get(title, ArrayRecord())
        if not isinstance(tensors, dict) or not isinstance(apart, ArrayRecord):
            raise RecordError(f"its {LAYOUT} has {title}, which is none of its arrays")
        record = ArrayRecord()
        for name, own in tensors.items():
            if own is None and name in apart:
                record[name] = apart[name]
                continue
            dtype, shape = _described(own, f"{title}/{name}")
            start, size = taken.get(dtype, 0), math.prod(shape)
            if dtype not in flat or start + size > len(flat[dtype]):
                raise RecordError(f"its {BUNDLE} ends before {title}/{name}")
            taken[dtype] = start + size
            record[name] = array_of(flat[dtype][start : start + size].reshape(shape))
        if left := [name for name in apart if name not in record]:
            raise RecordError(f"its {title} has {left[0]!r}, which its {LAYOUT} has not")
        found[title] = record
    if left := [dtype for dtype, own in flat.items() if taken[dtype] != len(own)]:
        raise RecordError(f"its {BUNDLE} holds more {left[0]} numbers than its {LAYOUT} says")
    return found


def _described(own: Any, title: str) -> tuple[str, list[int]]:
    """Return a tensor's dtype and shape as a layout has it; raise RecordError if it does not."""
    if isinstance(own, list) and len(own) == 2 and isinstance(own[0], str) and isinstance(own[1], list):
        dtype, shape = own
        if len(shape) <= 16 and all(type(size) is int and 0 <= size < 2**48 for size in shape):
            return dtype, shape
    raise RecordError(f"its {LAYOUT} does not say what {title} is")
