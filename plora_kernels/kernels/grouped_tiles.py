"""The table of tiles of the grouped form: each tile's group and rows.

It is computed on the device, so the host never reads the offsets: once for offsets that never change
(`plora_kernels.tile_tables`), otherwise in every call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.launch import cdiv
from plora_kernels.kernels.replay import empty, launch, look_up, replayed
from plora_kernels.tile_tables import tables_of

_GROUPS_A_STEP = 64
_TILES_A_PROGRAM = 16


class Groups(NamedTuple):
    """Groups on the device: offsets (C+1,) int32 or int64, and the scales.

    Either scales (C,) fp32 are the groups' scales and `scale` is 1, or scales is None and all groups have `scale`.
    """

    offsets: Tensor
    scales: Tensor | None
    scale: float

    @property
    def total(self) -> int:
        """The number of groups, C."""
        return self.offsets.shape[0] - 1


@triton.jit
def grouped_tiles_kernel(
    offsets_ptr,
    table_ptr,
    C,
    T,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store for every tile its group, its first row, the end of the group's rows, and the first row's number in it.

    offsets (C+1,); table (T, 4) int32. Tiles are ordered by group; table rows after the last tile have group −1.
    """
    tiles = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,)
    group = tl.full((BLOCK_T,), -1, tl.int32)
    start = tl.zeros((BLOCK_T,), tl.int32)
    end = tl.zeros((BLOCK_T,), tl.int32)
    number = tl.zeros((BLOCK_T,), tl.int32)
    before = tl.zeros((), tl.int32)
    for c in range(0, C, BLOCK_C):
        groups = c + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
        starts = tl.load(offsets_ptr + groups, mask=groups < C, other=0).to(tl.int32)
        ends = tl.load(offsets_ptr + groups + 1, mask=groups < C, other=0).to(tl.int32)
        counts = (ends - starts + BLOCK_M - 1) // BLOCK_M
        past = before + tl.cumsum(counts, 0)  # (BLOCK_C,) number of tiles of all groups up to and including each one
        within = tiles[:, None] - (past - counts)[None, :]  # (BLOCK_T, BLOCK_C) the tile's number in its group
        here = (within >= 0) & (within < counts[None, :])
        group = tl.maximum(group, tl.max(tl.where(here, groups[None, :], -1), 1))
        start += tl.sum(tl.where(here, starts[None, :], 0), 1)
        end += tl.sum(tl.where(here, ends[None, :], 0), 1)
        number += tl.sum(tl.where(here, within * BLOCK_M, 0), 1)
        before += tl.sum(counts, 0)
    ok = tiles < T
    tl.store(table_ptr + 4 * tiles, group, mask=ok)
    tl.store(table_ptr + 4 * tiles + 1, start + number, mask=ok)
    tl.store(table_ptr + 4 * tiles + 2, end, mask=ok)
    tl.store(table_ptr + 4 * tiles + 3, number, mask=ok)


@triton.jit
def load_tile(table_ptr, tile):
    """Return a tile's `(group, first row, end of the group's rows, number of the first row in the group)`."""
    row = table_ptr + 4 * tile
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def row_numbers(numbers_ptr, first, number, row_ok, BLOCK_M: tl.constexpr):
    """Return the numbers of rows first, first+1 … in a mask, (BLOCK_M,): loaded, or number, number+1 … for None."""
    rows = tl.arange(0, BLOCK_M)
    return number + rows if numbers_ptr is None else tl.load(numbers_ptr + first + rows, mask=row_ok, other=0)


def grouped_tiles(offsets: Tensor, rows: int, block_m: int) -> Tensor:
    """Return the table (T, 4) of tiles of at most block_m rows of one group: T = ⌊M / block_m⌋ + C are enough."""
    return look_up(_table, offsets, rows, block_m)


def _table(offsets: Tensor, rows: int, block_m: int) -> Tensor:
    """Return the table cached with the offsets, or a new one, which is cached if the offsets never change."""
    tables = tables_of(offsets)
    if tables is None:
        return _make_table(offsets, rows, block_m)
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        # A table of any stream may be used, because no work is pending when a capture begins. A table made during the
        # capture is not cached, because it has values only when the graph is replayed.
        kept = (table for key, table in tables.items() if key[:2] == (rows, block_m))
        found = next(kept, None)
        return _make_table(offsets, rows, block_m) if found is None else found
    stream = torch.cuda.current_stream(offsets.device).cuda_stream if offsets.is_cuda else 0
    key = rows, block_m, stream  # per stream, because another stream might read the table before it is written
    if key not in tables:
        tables[key] = _make_table(offsets, rows, block_m)
    return tables[key]


@replayed
def _make_table(offsets: Tensor, rows: int, block_m: int) -> Tensor:
    """Return the table (T, 4) of tiles of at most block_m rows of one group: T = ⌊M / block_m⌋ + C are enough."""
    count = offsets.shape[0] - 1
    tiles = rows // block_m + count
    table = empty((tiles, 4), torch.int32, offsets.device)
    with torch.cuda.device_of(offsets):
        launch(
            grouped_tiles_kernel,
            (cdiv(tiles, _TILES_A_PROGRAM),),
            offsets,
            table,
            count,
            tiles,
            BLOCK_M=block_m,
            BLOCK_T=_TILES_A_PROGRAM,
            BLOCK_C=_GROUPS_A_STEP,
            num_warps=1,
        )
    return table
