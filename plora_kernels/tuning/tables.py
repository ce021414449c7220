"""Measured block sizes on disk: one JSON file per device, the user's own or the one that comes with the package.

A file holds `{"meta": {…}, "entries": [{op, dtype, m, d_in, d_out, r, blocks: {…}, time_ms}, …]}`. `bench.tune`
measures the entries and writes the files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plora_kernels.errors import ConfigError
from plora_kernels.tuning.blocks import KINDS, Blocks, ShapeClass

PACKAGED = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Entry:
    """The fastest blocks measured for one shape class, and their time in milliseconds."""

    shape: ShapeClass
    blocks: Blocks
    time_ms: float


@dataclass(frozen=True)
class Table:
    """A device's measurements. `meta` describes the device; its `capability` is 10·major + minor."""

    meta: Mapping[str, Any]
    entries: tuple[Entry, ...]


def device_key(name: str) -> str:
    """Return a device's name as a file name: "NVIDIA H200" gives "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def user_folder() -> Path:
    """Return the folder of the user's tables: $PLORA_KERNELS_CACHE, else plora_kernels in the user's cache folder."""
    named = os.environ.get("PLORA_KERNELS_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plora_kernels"


def load_table(path: Path) -> Table:
    """Read a table; raise a ConfigError that names the file if it does not hold one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(_entry(item) for item in content["entries"])
        return Table(dict(content["meta"]), entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path} is not a table of block sizes ({problem}); remove it or write it anew with python -m bench.tune"
        ) from None


def save_table(path: Path, entries: Iterable[Entry], meta: Mapping[str, Any]) -> None:
    """Write a table to a temporary file and rename that, so that readers never see half a table."""
    items = [{**asdict(entry.shape), "blocks": asdict(entry.blocks), "time_ms": entry.time_ms} for entry in entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"meta": dict(meta), "entries": items}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _entry(item: Mapping[str, Any]) -> Entry:
    shape = ShapeClass(*(item[name] for name in ("op", "dtype", "m", "d_in", "d_out", "r")))
    return Entry(shape, KINDS[shape.op](**item["blocks"]), float(item["time_ms"]))
