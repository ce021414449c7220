"""Fold many weights with few launches: a table on the device gives each program its weight and tile.

The table is copied to the device asynchronously; the host does not wait for it.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.fold import fold, fold_kernel, fold_precision
from plora_kernels.kernels.launch import cdiv, constants, dtype_name, has_wide_factors, is_aligned, needs_wide_offsets
from plora_kernels.selection import to_device
from plora_kernels.tuning.blocks import FoldBlocks, ShapeClass
from plora_kernels.tuning.lookup import find_blocks

# weight, lora_A, lora_B, index, scale, seed, out: the arguments of `fold`.
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, float, int | None, Tensor]

COLUMNS = 16  # int64 columns of the table: a row has 128 bytes, one cache line
MOST_LAYERS = 512  # in one launch, because every program searches the first tiles of all layers
_NEVER = 2**62  # the first tile of padding layers, larger than any tile's number


@triton.jit
def fold_many_kernel(
    table_ptr,
    like_ptr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LAYERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE_FACTORS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold one tile of one of the table's weights; see `fold_kernel`.

    table int64: the first tile of every layer (LAYERS,), then for each layer a row (COLUMNS,) made by `_table_row`.
    All matrices have the element type of `like`, with WIDE_FACTORS the factors fp32; all but lora_B are contiguous
    along K.
    """
    first_tiles = tl.load(table_ptr + tl.arange(0, LAYERS))  # (LAYERS,) int64
    layer = tl.sum((first_tiles <= tl.program_id(0)).to(tl.int32), axis=0) - 1
    row_ptr = table_ptr + LAYERS + layer * COLUMNS
    stride_type = tl.int64 if WIDE_OFFSETS else tl.int32
    factor_type = tl.pointer_type(tl.float32) if WIDE_FACTORS else like_ptr.dtype
    weight_ptr = tl.load(row_ptr).to(like_ptr.dtype)
    out_ptr = tl.load(row_ptr + 1).to(like_ptr.dtype)
    a_ptr = tl.load(row_ptr + 2).to(factor_type)
    b_ptr = tl.load(row_ptr + 3).to(factor_type)
    index_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.int32))
    N = tl.load(row_ptr + 5).to(tl.int32)
    K = tl.load(row_ptr + 6).to(tl.int32)
    R = tl.load(row_ptr + 7).to(tl.int32)
    stride_wn = tl.load(row_ptr + 8).to(stride_type)
    stride_on = tl.load(row_ptr + 9).to(stride_type)
    stride_ar = tl.load(row_ptr + 10).to(stride_type)
    stride_bn = tl.load(row_ptr + 11).to(stride_type)
    stride_br = tl.load(row_ptr + 12).to(stride_type)
    scale = tl.load(row_ptr + 13).to(tl.int32).to(tl.float32, bitcast=True)
    seed = tl.load(row_ptr + 14)
    if ALIGNED:  # tell Triton what it would find out about kernel arguments by itself
        weight_ptr, out_ptr = tl.multiple_of(weight_ptr, 16), tl.multiple_of(out_ptr, 16)
        a_ptr, b_ptr = tl.multiple_of(a_ptr, 16), tl.multiple_of(b_ptr, 16)
        K = tl.multiple_of(K, 16)
        stride_wn, stride_on = tl.multiple_of(stride_wn, 16), tl.multiple_of(stride_on, 16)
        stride_ar = tl.multiple_of(stride_ar, 16)
    fold_kernel(
        weight_ptr, out_ptr, a_ptr, b_ptr, index_ptr, tl.load(table_ptr + layer).to(tl.int32), N, K, R, scale,
        seed, seed >> 32, stride_wn, 1, stride_on, 1, stride_ar, 1, stride_bn, stride_br,
        BLOCK_N, BLOCK_K, BLOCK_R, ONE_BLOCK, STOCHASTIC, WIDE_OFFSETS, PRECISION,
    )  # fmt: skip


def batches(folds: Sequence[Arguments]) -> list[list[Arguments]]:
    """Return the folds in lists, of which each is one launch of at most MOST_LAYERS folds.

    The folds of a list have the same device, dtypes, rounding, alignment and offset width. A list has a single fold if
    a matrix is not contiguous along K, if there is no index, and during the capture of a CUDA graph, because its
    replays would copy a table that has been freed on the host.
    """
    alone: list[list[Arguments]] = []
    together: dict[tuple[object, ...], list[Arguments]] = defaultdict(list)
    for arguments in folds:
        weight, lora_A, _, index, _, seed, out = arguments
        if weight.numel() == 0:
            continue
        capturing = weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing or index is None or any(matrix.stride(1) != 1 for matrix in (weight, out, lora_A)):
            alone.append([arguments])
            continue
        dtypes = weight.dtype, lora_A.dtype
        kind = weight.device, *dtypes, seed is None, _is_aligned(arguments), _is_wide(arguments)
        together[kind].append(arguments)
    firsts = ((group, first) for group in together.values() for first in range(0, len(group), MOST_LAYERS))
    return alone + [group[first : first + MOST_LAYERS] for group, first in firsts]


def fold_batch(batch: Sequence[Arguments]) -> None:
    """Do the folds of one of `batches` as `fold` does them, in one launch."""
    if len(batch) == 1:
        fold(*batch[0])
    else:
        _launch(batch)


def _is_aligned(arguments: Arguments) -> bool:
    weight, lora_A, lora_B, *_, out = arguments
    # Vectorised stores with one predicate would write beyond the end of a row, into the gap before the next row.
    whole = weight.shape[1] % 16 == 0
    return whole and all(is_aligned(matrix) for matrix in (weight, out, lora_A)) and lora_B.data_ptr() % 16 == 0


def _is_wide(arguments: Arguments) -> bool:
    weight, lora_A, lora_B, *_, out = arguments
    return needs_wide_offsets(256, weight, lora_A, lora_B, out)


def _launch(group: Sequence[Arguments]) -> None:
    """Fold one list of `batches`: either all folds are aligned or none, and the same for wide offsets."""
    aligned, wide, lora_A = _is_aligned(group[0]), _is_wide(group[0]), group[0][1]
    largest = max((arguments[0] for arguments in group), key=Tensor.numel)
    width = max(_width(arguments) for arguments in group)
    n, k = largest.shape
    shape = ShapeClass("fold", dtype_name(largest.dtype), n, k, n, width)
    wide_factors = has_wide_factors(largest, lora_A)
    blocks = find_blocks(FoldBlocks, shape, largest.device, aligned, wide_factors=wide_factors)
    layers = max(16, triton.next_power_of_2(len(group)))
    first_tiles, rows, tiles = [], [], 0
    for arguments in group:
        first_tiles.append(tiles)
        rows += _table_row(arguments)
        tiles += cdiv(arguments[0].shape[0], blocks.block_n) * cdiv(arguments[0].shape[1], blocks.block_k)
    first_tiles += [_NEVER] * (layers - len(group))
    table = to_device([*first_tiles, *rows], torch.int64, largest.device)
    with torch.cuda.device_of(largest):
        fold_many_kernel[(tiles,)](
            table,
            largest,
            **constants(blocks),
            LAYERS=layers,
            COLUMNS=COLUMNS,
            ONE_BLOCK=width <= blocks.block_r,
            ALIGNED=aligned,
            WIDE_FACTORS=wide_factors,
            STOCHASTIC=group[0][5] is not None,
            WIDE_OFFSETS=wide,
            PRECISION=fold_precision(largest, lora_A),
        )


def _width(arguments: Arguments) -> int:
    index = arguments[3]
    return arguments[1].shape[0] if index is None else index.shape[0]


def _table_row(arguments: Arguments) -> list[int]:
    """Return the table row of one fold for `fold_many_kernel`; the scale is given by the bits of its fp32 value."""
    weight, lora_A, lora_B, index, scale, seed, out = arguments
    pointers = [t.data_ptr() if t is not None else 0 for t in (weight, out, lora_A, lora_B, index)]
    sizes = [*weight.shape, _width(arguments)]
    strides = [weight.stride(0), out.stride(0), lora_A.stride(0), *lora_B.stride()]
    scale_bits = ctypes.c_int32.from_buffer(ctypes.c_float(scale)).value
    return [*pointers, *sizes, *strides, scale_bits, seed or 0, 0]
