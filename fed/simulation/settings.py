"""A run's settings as its checkpoints and its finished run hold them, and which of them may change when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from fed.config import EARLIER, PATHS, RunConfig, flat

# Settings that may change when a run is resumed. Paths may, because inputs are known by their digests.
_FREE = (
    *("rounds", "threads", "checkpoint_every", "device", "tracker", "server.patience"),
    *("engine.name", "engine.address", "engine.nodes", "engine.wait", "engine.deadline", "engine.resends"),
    *PATHS,
)


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Return every setting that must not change when a run is resumed, by dotted name, as JSON values."""
    return {key: value for key, value in flat(config.model_dump(mode="json")) if key not in _FREE}


@cache
def _before() -> dict[str, Any]:
    """Return what every setting stood at in a version that did not have it yet."""
    return {**fixed_settings(RunConfig()), **dict(flat(EARLIER))}


def changed_setting(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first of the fixed settings that differs, with both values, as text; None if none does.

    `clients_per_pass = 0` stands for the size that a run has measured. A setting that a run of an earlier version did
    not save stands for what that version did.

    >>> changed_setting({"seed": 1, "clients_per_pass": 20}, {"seed": 2, "clients_per_pass": 0})
    'seed = 1, and the run has 2'
    """
    for name in sorted({*saved, *now} - {*_FREE}):
        before, after = saved.get(name, _before().get(name)), now.get(name, _before().get(name))
        if before != after and not (name == "clients_per_pass" and 0 in (before, after)):
            return f"{name} = {before!r}, and the run has {after!r}"
    return None
