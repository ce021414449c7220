"""Flower's records over a local connection: a header of JSON, then the bytes of each array; no pickles."""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

_PLAIN = {"config": ConfigRecord, "metrics": MetricRecord}


def send(connection: Connection, kind: str, facts: dict[str, Any], content: RecordDict) -> None:
    """Send a message of some kind: plain values for the other end, and the records of a message of Flower's."""
    records: list[list[Any]] = []
    arrays: list[Array] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            records.append([name, "arrays", [[key, own.dtype, own.shape, own.stype] for key, own in record.items()]])
            arrays += record.values()
        else:
            form = "config" if isinstance(record, ConfigRecord) else "metrics"
            records.append([name, form, dict(record)])
    connection.send_bytes(json.dumps({"kind": kind, "facts": facts, "records": records}).encode())
    for array in arrays:
        connection.send_bytes(array.data)


def receive(connection: Connection) -> tuple[str, dict[str, Any], RecordDict]:
    """Return the kind, the plain values and the records that `send` sent; raise EOFError if the other end is gone."""
    header = json.loads(connection.recv_bytes())
    content = RecordDict()
    for name, form, held in header["records"]:
        if form == "arrays":
            content[name] = ArrayRecord(
                {key: Array(dtype, tuple(shape), stype, connection.recv_bytes()) for key, dtype, shape, stype in held}
            )
        else:
            content[name] = _PLAIN[form](held)
    return header["kind"], header["facts"], content
