"""The choice of a launch's blocks: the nearest measured entry for its device, or the safe default.

The host looks them up and caches them; nothing is tuned at run time.
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
from plora_kernels.tuning.blocks import (
    Blocks,
    Hardware,
    ShapeClass,
    for_wide_factors,
    shared_bytes,
    staged_bytes,
    tile,
)
from plora_kernels.tuning.defaults import default_blocks
from plora_kernels.tuning.tables import PACKAGED, Entry, Table, device_key, load_table, user_folder

B = TypeVar("B", bound=Blocks)
# How far an entry's shape may be from a launch's, in powers of two: its rows, and the sum over all its sizes.
MOST_ROW_STEPS, MOST_STEPS = 2, 4
# From this many modules on, an entry for fewer may be used.
MOST_MODULES = 256

_forced: dict[str, Blocks] = {}
_taken: dict[str, Blocks] | None = None
_generation = 0


def find_blocks(
    kind: type[B], shape: ShapeClass, device: torch.device, aligned: bool, *, wide_factors: bool = False
) -> B:
    """Return the blocks, of the class `kind`, that a launch of this shape takes on a device.

    The first of these: the blocks of `override_blocks`; the nearest entry in the user's table for the device, in the
    packaged table for it, and in the packaged table of the most similar device; the default. Tables are used for
    aligned shapes only. With `wide_factors`, that is factors in fp32 beside the shape's half precision, all of them,
    which are for factors in that precision, go through `for_wide_factors`.
    """
    blocks = _forced.get(shape.op) or _chosen(shape, device, aligned)
    if wide_factors:
        blocks = for_wide_factors(blocks, shape, capability_of(device))
    if _taken is not None:
        _taken[shape.op] = blocks
    if not isinstance(blocks, kind):
        raise ConfigError(f"blocks of {shape.op} are {blocks!r}; {kind.__name__} is needed")
    return blocks


@contextmanager
def override_blocks(blocks: Mapping[str, Blocks]) -> Iterator[None]:
    """Make every launch of the named ops use these blocks inside the context; for the tuner and for tests."""
    before = dict(_forced)
    _forced.update(blocks)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def record_blocks() -> Iterator[dict[str, Blocks]]:
    """Yield a dictionary that collects, for each op launched inside the context, the blocks of its last launch."""
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
    """Return the properties of a device that blocks depend on."""
    return Hardware(capability_of(device), multiprocessors_of(device))


def table_paths(name: str) -> tuple[Path, Path]:
    """Return the paths of the tables of a device with this name: the user's table and the packaged one."""
    file = f"{device_key(name)}.json"
    return user_folder() / file, PACKAGED / file


def tables_generation() -> int | None:
    """Return a number that changes when launches may get other blocks; None inside `override_` and `record_blocks`."""
    return None if _forced or _taken is not None else _generation


def forget_tables() -> None:
    """Clear the caches, so that the next launch reads the tables again; call it after writing a table."""
    global _generation
    _tables_of.cache_clear()
    _chosen.cache_clear()
    _generation += 1  # after the caches are cleared, so that blocks found under the new number are new


@functools.lru_cache(maxsize=8192)
def _chosen(shape: ShapeClass, device: torch.device, aligned: bool) -> Blocks:
    hardware = hardware_of(device)
    found = (nearest(table, shape, hardware) for table in (_tables_of(device) if aligned else ()))
    entry = next((entry for entry in found if entry is not None), None)
    return entry.blocks if entry is not None else default_blocks(shape, hardware, aligned)


@functools.cache
def _tables_of(device: torch.device) -> tuple[Table, ...]:
    """Return a device's tables in the order of lookup; an unreadable one is skipped with a warning.

    They are the user's table, the packaged one, and the packaged table of the most similar other device.
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
    """Say whether a table's device has the same kind of matrix units, so that its blocks are better than a default.

    Those of sm_90 multiply from shared memory into registers, those of sm_10x and sm_11x from shared memory into tensor
    memory, and those of older GPUs and sm_12x from registers; AMD's are another kind. Blocks that compile for one kind
    may not compile for another.
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

    Entries are ignored if their rows differ by more than a factor of 4, or all sizes together by more than a factor of
    16: the blocks that are fastest for 8,192 rows are not for one row. So are entries for fewer modules, in powers of
    two from 16 on, because their blocks go over the others in a loop: with those for 16, a fold of 64 takes twice as
    long on an H200. In the table of a device with more shared memory, entries that need more than this device has are
    ignored.
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
    """Return log₂(a/b): how many powers of two a is above b."""
    return math.log2(max(a, 1) / max(b, 1))


def _is_near(entry: ShapeClass, wanted: ShapeClass) -> bool:
    # A tile has at least 16 rows, so fewer rows take as long as 16.
    pairs = (
        (max(entry.m, 16), max(wanted.m, 16)),
        (entry.d_in, wanted.d_in),
        (entry.d_out, wanted.d_out),
        (entry.r, wanted.r),
    )
    rows, *others = (abs(_steps(*pair)) for pair in pairs)
    modules = tile(entry.r, MOST_MODULES) >= tile(wanted.r, MOST_MODULES)
    return modules and rows <= MOST_ROW_STEPS and rows + sum(others) <= MOST_STEPS


def _distance(entry: ShapeClass, wanted: ShapeClass) -> float:
    sizes = sum(
        abs(_steps(*pair)) for pair in ((entry.m, wanted.m), (entry.d_in, wanted.d_in), (entry.d_out, wanted.d_out))
    )
    return sizes + 2 * abs(_steps(entry.r, wanted.r))
