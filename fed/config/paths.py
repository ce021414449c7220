"""The settings that are paths: as they are given in memory, and absolute in files, which may be read from elsewhere."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Their dotted names. What exists on this machine is a path, else perhaps the name of a data set on the hub; a cache
# need not exist yet.
PATHS = ("data.path", "data.test_path", "model.path", "data.cache", "engine.root_certificates")


def located(table: Mapping[str, Any], directory: str | os.PathLike[str] = "") -> dict[str, Any]:
    """Return a nested table with paths made absolute; relative ones are relative to `directory`.

    >>> located({"data": {"cache": "tokens"}, "rounds": 3}, "/here")
    {'data': {'cache': '/here/tokens'}, 'rounds': 3}
    """
    found = copy.deepcopy(dict(table))
    for key in PATHS:
        name, _, last = key.partition(".")
        inner = found.get(name)
        if isinstance(inner, dict) and isinstance(path := inner.get(last), str):
            absolute = Path(directory).absolute() / path
            if key == "data.cache" or absolute.exists():
                inner[last] = str(absolute)
    return found


def same_setting(key: str, one: object, other: object) -> bool:
    """Say whether two values of a setting are the same: equal, or names of the same path.

    >>> same_setting("model.path", "base", os.path.abspath("base")), same_setting("method", "a", "b")
    (True, False)
    """
    if one == other:
        return True
    if key not in PATHS or not isinstance(one, str) or not isinstance(other, str):
        return False
    return os.path.realpath(one) == os.path.realpath(other)
