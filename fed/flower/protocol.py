"""What the server's and the clients' side of a run over Flower agree on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

PROTOCOL = 1  # changed whenever a message's meaning does
JOIN, TRAIN = "query", "train"  # the types of messages, among those that Flower knows
ASK = "query.working"  # whether a machine works on a message: the record `ASK` has MESSAGE, and its reply WORKING
MESSAGE, WORKING = "message", "working"


def versions() -> dict[str, Any]:
    """Return what has to be the same on every machine, and what is told where it is not."""
    found: dict[str, Any] = {"protocol": PROTOCOL}
    for name in ("plora-kernels", "torch", "flwr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def why_other_version(own: dict[str, Any], others: Any) -> str | None:
    """Return in words why a machine with `others` versions cannot take part, or None.

    >>> why_other_version({"protocol": 1, "plora-kernels": "0.2"}, {"protocol": 1, "plora-kernels": "0.1"})
    'it has plora-kernels 0.1, and the server 0.2'
    """
    others = others if isinstance(others, dict) else {}
    for name in ("protocol", "plora-kernels"):
        if others.get(name) != own[name]:
            return f"it has {name} {str(others.get(name))[:40]}, and the server {own[name]}"
    return None
