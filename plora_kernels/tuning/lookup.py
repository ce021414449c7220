"""Which blocks a launch takes: the nearest measured entry for its device, or the safe default.

Looked up on the host and remembered; nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from plora_kernels.errors import ConfigError
from plora_kernels.tuning.blocks import Blocks, Hardware, ShapeClass, shared_bytes, staged_bytes
from plora_kernels.tuning.defaults import default_blocks
from plora_kernels.tuning.tables import PACKAGED, Entry, Table, device_key, load_table, user_folder

B = TypeVar("B", bound=Blocks)
# How far from a shape an entry may be measured, in powers of two: its rows, and all its sizes together.
MOST_ROW_STEPS, MOST_STEPS = 2, 4

_forced: dict[str, Blocks] = {}
_taken: dict[str, Blocks] | None = None
_generation = 0


def find_blocks(kind: type[B], shape: ShapeClass, device: torch.device, aligned: bool) -> B:
    """Return the blocks, of the class `kind`, that a launch of this shape takes on a device.

    In this order: what `override_blocks` says; the nearest entry of the user's table for the device, of the packaged
    one, or of the packaged table of the device most like it; the default. Tables hold aligned shapes alone.
    """
    blocks = _forced.get(shape.op) or _chosen(shape, device, aligned)
    if _taken is not None:
        _taken[shape.op] = blocks
    if not isinstance(blocks, kind):
        raise ConfigError(f"blocks of {shape.op} are {blocks!r}; {kind.__name__} is needed")
    return blocks


@contextmanager
def override_blocks(blocks: Mapping[str, Blocks]) -> Iterator[None]:
    """Let every launch of the named ops take these blocks: the way in for the tuner and for tests."""
    before = dict(_forced)
    _forced.update(blocks)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def record_blocks() -> Iterator[dict[str, Blocks]]:
    """Yield a dictionary that receives the blocks of every op launched meanwhile, those of its last launch."""
    global _taken
    before, _taken = _taken, {}
    try:
        yield _taken
    finally:
        _taken = before


@functools.cache
def capability_of(device: torch.device) -> int:
    """Return 10·major + minor of a CUDA device, and 0 for a ROCm device or the interpreter's CPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, and 1 for the interpreter's CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def hardware_of(device: torch.device) -> Hardware:
    """Return what blocks depend on of a device."""
    return Hardware(capability_of(device), multiprocessors_of(device))


def table_paths(name: str) -> tuple[Path, Path]:
    """Return where the tables of a device of this name lie: the user's, and the packaged one."""
    file = f"{device_key(name)}.json"
    return user_folder() / file, PACKAGED / file


def tables_generation() -> int | None:
    """Return a number that changes whenever launches may take other blocks; None while they are forced or noted."""
    return None if _forced or _taken is not None else _generation


def forget_tables() -> None:
    """Read the tables anew at the next launch: after one was written."""
    global _generation
    _tables_of.cache_clear()
    _chosen.cache_clear()
    _generation += 1  # last: what is looked up from now on is new


@functools.lru_cache(maxsize=8192)
def _chosen(shape: ShapeClass, device: torch.device, aligned: bool) -> Blocks:
    hardware = hardware_of(device)
    found = (nearest(table, shape, hardware) for table in (_tables_of(device) if aligned else ()))
    entry = next((entry for entry in found if entry is not None), None)
    return entry.blocks if entry is not None else default_blocks(shape, hardware, aligned)


@functools.cache
def _tables_of(device: torch.device) -> tuple[Table, ...]:
    """Return a device's tables in the order they are looked at; an unreadable one is passed over with a warning.

    They are the user's, the packaged one, and, of the other packaged ones, that of the device most like it.
    """
    if device.type != "cuda":
        return ()
    hardware, own = hardware_of(device), table_paths(torch.cuda.get_device_name(device))
    packaged = (_readable(path) for path in sorted(PACKAGED.glob("*.json")) if path not in own)
    known = [table for table in packaged if table is not None and _is_like(table, hardware)]
    tables = [*map(_readable, own), min(known, key=lambda table: _difference(table, hardware), default=None)]
    return tuple(table for table in tables if table is not None)


def _readable(path: Path) -> Table | None:
    if not path.is_file():
        return None
    try:
        return load_table(path)
    except ConfigError as error:
        warnings.warn(str(error), stacklevel=2)
        return None


def _is_like(table: Table, hardware: Hardware) -> bool:
    """Say whether blocks measured on a table's device are worth more than a default: its matrix units work alike.

    Those of sm_90 multiply from shared memory into registers, of sm_10x and sm_11x into a memory of their own, of older
    GPUs and sm_12x from registers; AMD's are a family of their own. What compiles for one may not for another.
    """
    capability = table.meta.get("capability")
    if not isinstance(capability, int):
        return False
    other = Hardware(capability, 1)
    return _matrix_units(other) == _matrix_units(hardware)


def _matrix_units(hardware: Hardware) -> tuple[bool, bool, bool]:
    return hardware.capability == 0, hardware.has_tma, hardware.is_hopper


def _difference(table: Table, hardware: Hardware) -> tuple[int, float]:
    count = table.meta.get("multiprocessors") or hardware.multiprocessors
    return abs(table.meta["capability"] - hardware.capability), abs(math.log2(count / hardware.multiprocessors))


def nearest(table: Table, shape: ShapeClass, hardware: Hardware) -> Entry | None:
    """Return the table's entry of the same op and dtype whose sizes are nearest, in powers of two; None without one.

    An entry whose rows differ by more than four times, or whose sizes by more than sixteen in all, says nothing of this
    shape: what is fastest for 8,192 rows is not for one. A smaller r counts heavily: blocks made for fewer modules read
    the large input again for the rest. In the table of a device with more shared memory, entries that need it are
    passed over.
    """
    limit, theirs = shared_bytes(hardware.capability), shared_bytes(table.meta.get("capability") or 0)
    same = [
        entry
        for entry in table.entries
        if (entry.shape.op, entry.shape.dtype) == (shape.op, shape.dtype)
        and _is_near(entry.shape, shape)
        and (theirs <= limit or staged_bytes(entry.blocks, shape.dtype) <= limit)
    ]
    return min(same, key=lambda entry: _distance(entry.shape, shape), default=None)


def _steps(a: int, b: int) -> float:
    """Return how many powers of two a is above b."""
    return math.log2(max(a, 1) / max(b, 1))


def _is_near(entry: ShapeClass, wanted: ShapeClass) -> bool:
    # Fewer than sixteen rows fill one tile as sixteen do.
    pairs = (
        (max(entry.m, 16), max(wanted.m, 16)),
        (entry.d_in, wanted.d_in),
        (entry.d_out, wanted.d_out),
        (entry.r, wanted.r),
    )
    rows, *others = (abs(_steps(*pair)) for pair in pairs)
    return rows <= MOST_ROW_STEPS and rows + sum(others) <= MOST_STEPS


def _distance(entry: ShapeClass, wanted: ShapeClass) -> float:
    sizes = sum(
        abs(_steps(*pair)) for pair in ((entry.m, wanted.m), (entry.d_in, wanted.d_in), (entry.d_out, wanted.d_out))
    )
    modules = _steps(entry.r, wanted.r)
    return sizes + (2 * modules if modules >= 0 else 4 - 8 * modules)
