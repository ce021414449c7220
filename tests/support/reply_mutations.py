"""Broken and hostile replies: a reply of a round, changed at random at any level."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message

from fed.flower.bundles import bundled
from fed.flower.records import FACTS
from tests.support.recorded_grid import copied, facts_in, read_array

NUMBERS = (0, 1, -1, 2, 3, 255, 2**31, 2**62, 2**63 - 1, -(2**63), 0.0, -0.0, -1.5, 1e-300, 1e10, 1e308)
NUMBERS += (float("nan"), float("inf"), float("-inf"), 0.5)
SHAPES: Sequence[tuple[Any, ...]] = (
    (),
    (0,),
    (1,),
    (-1,),
    (-2, -3),
    (2**40, 2**40),
    (0, 2**60),
    (1,) * 40,
    (2**63 - 1,),
)
DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "uint8",
    "bool",
    "object",
    "complex128",
    ">f8",
    "",
    "x" * 500,
)
JSON = (None, True, False, [], {}, "", "\x1b[2J\u202e", [[[]]], -1, 10**400, 1e999, {"id": 0}, [0, 0, 1], "NaN", 2**70)
NAMES = ("A/", "B/x", "head/", "memory/rank", "gradients/x", "\x00", "../../x", "x" * 2000, "\u202eevil", "of ", "sent")


def mutate(random: Random, content: RecordDict, earlier: RecordDict) -> RecordDict:
    """Return a changed copy of a reply; `earlier` is another one, of an earlier round for example."""
    content = copied(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = random.choice(_CHANGES)
        content = change(random, content, earlier) or content
    return content


def mutated_bundle(random: Random, content: RecordDict) -> RecordDict:
    """Return a reply with its tensors bundled, if they can be, and the bundle changed."""
    try:
        content = bundled(content)
    except ValueError:
        return content
    for _ in range(random.choice((0, 1, 1, 2))):
        random.choice(_BUNDLE_CHANGES)(random, content, content)
    return content


def tampered(random: Random, reply: Message, earlier: RecordDict) -> list[Message]:
    """Return what comes in place of a reply: mostly one that is changed, sometimes an error, or several."""
    kind = random.random()
    if kind < 0.02:
        return [with_error(reply, "\x1b[31m" * random.randrange(3), random.randrange(10))]
    content = mutate(random, reply.content, earlier)
    if random.random() < 0.5:
        content = mutated_bundle(random, content)
    changed = with_content(reply, content)
    if kind < 0.04:
        return [changed, reply]
    if kind < 0.06:
        return [reply, changed]
    return [changed]


def with_content(reply: Message, content: RecordDict) -> Message:
    """Return a reply to the same message with another content."""
    return make_message(reply.metadata, content=content)


def with_error(reply: Message, reason: str, code: int = 1) -> Message:
    """Return an error in place of a reply."""
    return make_message(reply.metadata, error=Error(code, reason))


def tampered_array(random: Random, array: Array) -> Array:
    """Return an array with another dtype, shape, kind or content than it says, or with values that cannot be."""
    value = read_array(array)
    dtype, shape, stype, data = array.dtype, tuple(array.shape), array.stype, array.data
    kind = random.randrange(16)
    if kind == 0:
        dtype = random.choice(DTYPES)
    elif kind == 1:
        shape = random.choice(SHAPES)
    elif kind == 2:
        stype = random.choice(("", "torch", "pickle", "numpy.ndarray "))
    elif kind == 3:
        data = data[: random.randrange(len(data))]
    elif kind == 4:
        data += bytes(random.randrange(1, 100))
    elif kind == 5:
        place = random.randrange(min(len(data), 160))
        data = data[:place] + bytes([random.randrange(256)]) + data[place + 1 :]
    elif kind == 6:
        data = pickle.dumps(value)
    elif kind == 7:
        data = header(random.choice((*SHAPES, shape)), "|O") + pickle.dumps([print])
    elif kind == 8:
        shape = random.choice(SHAPES)
        data = header(shape, value.dtype.str) + value.tobytes()
    elif kind == 9:
        data = header(shape, value.dtype.str, True) + value.tobytes()
    elif kind == 10:
        return Array(value.astype(random.choice(("float32", "float16", "int64", "complex128", ">f8"))))
    elif kind == 11:
        return Array(np.zeros(random.choice(((), (0,), (0, 3), (3, 0), (1, 1), shape[::-1]))))
    elif kind == 12:
        value.flat[random.randrange(value.size)] = random.choice((np.nan, np.inf, -np.inf, 1e308, -1e300, 1e-320, 1e5))
        return Array(value)
    elif kind == 13:
        return Array(value * random.choice((0.0, -1.0, 1e-6, 2.0, 1e4, 1e12, 1e150)))
    elif kind == 14:
        data = bytes(random.randrange(256) for _ in range(random.randrange(300)))
    else:
        bits = Array(np.asarray(value, np.float32).view(np.uint16) if value.ndim and value.shape[-1] else value)
        return Array("bfloat16", bits.shape, bits.stype, bits.data)
    return Array(dtype, shape, stype, data)


def header(shape: tuple[Any, ...], descr: str, by_column: bool = False) -> bytes:
    """Return NumPy's header of an array that may be anything."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "descr": descr, "fortran_order": by_column})
    return stream.getvalue()


def _drop(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    if content:
        del content[random.choice(list(content))]


def _rename(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    if content:
        name = random.choice(list(content))
        record = content.pop(name)
        content[random.choice((name + "0", name.replace("-", "_"), name.upper(), "", *NAMES[:4], "arrays--1"))] = record


def _exchange(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    if len(content) > 1:
        one, other = random.sample(list(content), 2)
        content[one], content[other] = content[other], content[one]


def _other_kind(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    if content:
        others = (
            ConfigRecord({"json": "{}"}),
            MetricRecord({"weight": 1.0}),
            ArrayRecord(),
            MetricRecord(),
            ConfigRecord(),
        )
        content[random.choice(list(content))] = random.choice(others)


def _add(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    names = [
        f"{kind}-{client}" for kind in ("arrays", "modules", "metrics", "fault", "own") for client in (0, 1, 7, -1)
    ]
    if content:
        content[random.choice(names)] = copied(content)[random.choice(list(content))]


def _fault(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    said: Any = random.choice(("out of memory", "\x1b[2J", "", 7, [1, 2], b"\xff"))
    content[f"fault-{random.randrange(5)}"] = ConfigRecord({random.choice(("fault", "x")): said})


def _nothing(random: Random, content: RecordDict, earlier: RecordDict) -> RecordDict:
    return RecordDict()


def _earlier(random: Random, content: RecordDict, earlier: RecordDict) -> RecordDict:
    """Return another reply, or its updates under this one's facts."""
    other = copied(earlier)
    if random.random() < 0.5 and FACTS in content:
        other[FACTS] = content[FACTS]
    return other


def _facts(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    try:
        facts = facts_in(content)
        changed = {random.choice((*facts, "lacks", "x")): random.choice(JSON)}
        text = json.dumps(facts | changed)
    except (KeyError, ValueError, TypeError, RecursionError):
        text = "{}"
    broken = text[: random.randrange(len(text))], "[" * 100_000, f'{{"a": {"1" * 5000}}}', "null", "[]", '"' * 3
    text = random.choice((text, text, text, *broken))
    content[FACTS] = ConfigRecord({"json": random.choice((text, text, text, 3, text.encode(), [text], True))})


def _arrays(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    records = [record for record in content.values() if isinstance(record, ArrayRecord) and record]
    if not records:
        return
    record = random.choice(records)
    name = random.choice(list(record))
    kind = random.randrange(10)
    if kind == 0:
        del record[name]
    elif kind == 1:
        record[random.choice((*NAMES, name + "x", name.replace("A/", "B/")))] = record.pop(name)
    elif kind == 2:
        record[random.choice(NAMES)] = record[name]
    elif kind == 3:
        other = random.choice(list(record))
        record[name], record[other] = record[other], record[name]
    else:
        try:
            record[name] = tampered_array(random, record[name])
        except ValueError:  # it was tampered with already, and cannot be read
            record[name] = Array("float64", (1,), "numpy.ndarray", b"")


def _layout(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    try:
        layout: dict[str, Any] = json.loads(str(content["layout"]["json"]))
        title = random.choice(list(layout))
        tensors = layout[title]
        name = random.choice(list(tensors))
        dtype, shape = tensors[name]
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):  # there is none any more, or it is broken
        return
    kind = random.randrange(9)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[random.choice((*NAMES, name + "x", name.replace("A/", "B/")))] = tensors.pop(name)
    elif kind == 2:
        layout[random.choice((FACTS, "bundle", "layout", "modules-0", "metrics-1", "arrays-9", *NAMES))] = layout[title]
    elif kind == 3:
        layout[title] = random.choice(JSON)
    elif kind == 4:
        tensors[name] = random.choice((*JSON, [dtype], [shape, dtype], [dtype, shape, 0], [dtype, "x"], [dtype, None]))
    elif kind == 5:
        tensors[name] = [random.choice(DTYPES), shape]
    elif kind == 6:
        wrong = [*map(list, SHAPES), shape[::-1], [*shape, 1], [1.0, *shape], [True, *shape], ["1"], [None], [10**30]]
        tensors[name] = [dtype, random.choice(wrong)]
    elif kind == 7:
        layout[title] = dict(reversed(tensors.items()))
    else:
        tensors["x"] = [dtype, random.choice(([0], [1], [], [2**60, 0]))]
    text = json.dumps(layout)
    content["layout"] = ConfigRecord({"json": random.choice((text, text, text, text, text[:-1], "[]", 3))})


def _modules(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    records = [record for name, record in content.items() if name.startswith("modules") and record]
    if not records or not isinstance(records[0], ConfigRecord):
        return
    record = random.choice(records)
    name = random.choice(list(record))
    known = record[name]
    chosen: list[Any] = [*known] if isinstance(known, list) else [0]
    wrong: list[Any] = [
        *(chosen[:-1], [*chosen, *chosen[:1]], [*chosen, 0], [-1, *chosen[1:]], [2**62], chosen[::-1], []),
        *(
            [float(own) for own in chosen],
            [str(own) for own in chosen],
            [bool(own) for own in chosen],
            0,
            "AB",
            "A",
            b"x",
        ),
        *(1.5, True, [b"\xff"], list(range(300)), [0] * 1000),
    ]
    if random.random() < 0.2:
        del record[name]
        if random.random() < 0.5:
            record[random.choice(("of x", "x", "of ", name + " "))] = known
    else:
        record[name] = random.choice(wrong)


def _metrics(random: Random, content: RecordDict, earlier: RecordDict) -> None:
    records = [record for record in content.values() if isinstance(record, MetricRecord) and record]
    if not records:
        return
    record = random.choice(records)
    name = random.choice(list(record))
    if random.random() < 0.2:
        value = record.pop(name)
        if random.random() < 0.5:
            record[random.choice(("x", "init_noise", "factor_noise_A", "trainable_parameters"))] = value
    else:
        number = random.choice(NUMBERS)
        record[name] = random.choice((number, number, number, [number], [number, number]))


_CHANGES: Sequence[Callable[[Random, RecordDict, RecordDict], RecordDict | None]] = (
    *(_drop, _rename, _exchange, _other_kind, _add, _fault, _nothing, _earlier),
    *(_facts, _facts, _arrays, _arrays, _arrays, _arrays, _modules, _modules, _metrics, _metrics, _metrics),
)
_BUNDLE_CHANGES: Sequence[Callable[[Random, RecordDict, RecordDict], RecordDict | None]] = (
    *(_drop, _rename, _exchange, _other_kind, _arrays, _arrays, _layout, _layout, _layout, _layout, _layout),
)
