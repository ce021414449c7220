"""A run's settings as its checkpoints and its finished run hold them, and which of them may change when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fed.config import PATHS, RunConfig, flat

# Settings that may change when a run is resumed. Paths may, because inputs are known by their digests.
_FREE = (
    *("rounds", "threads", "checkpoint_every", "device", "tracker", "server.patience"),
    *PATHS,
)


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Return every setting that must not change when a run is resumed, by dotted name, as JSON values."""
    return {key: value for key, value in flat(config.model_dump(mode="json")) if key not in _FREE}


def changed_setting(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first of the fixed settings that differs, with both values, as text; None if none does.

    `clients_per_pass = 0` stands for the size that a run has measured.

    >>> changed_setting({"seed": 1, "clients_per_pass": 20}, {"seed": 2, "clients_per_pass": 0})
    'seed = 1, and the run has 2'
    """
    for name in sorted({*saved, *now} - {*_FREE}):
        before, after = saved.get(name), now.get(name)
        if before != after and not (name == "clients_per_pass" and 0 in (before, after)):
            return f"{name} = {before!r}, and the run has {after!r}"
    return None
