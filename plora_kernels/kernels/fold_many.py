"""Fold into many weights in one launch per dtype: a table on the device says whose tile each program does.

The table travels to the device in one asynchronous copy; nothing waits for it on the host.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from plora_kernels.kernels.fold import fold, fold_tile
from plora_kernels.kernels.launch import cdiv, dot_precision, dtype_name, is_aligned, needs_wide_offsets
from plora_kernels.selection import to_device
from plora_kernels.tuning.blocks import FoldBlocks, ShapeClass
from plora_kernels.tuning.lookup import find_blocks

# weight, lora_A, lora_B, index, scale, seed, out: the arguments of `fold`.
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, float, int | None, Tensor]

COLUMNS = 16  # of a table row: 128 bytes, one line of the cache
MOST_LAYERS = 512  # in one launch; every program looks through their first tiles
_NEVER = 2**62  # the first tile of a layer that is not there


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
    STOCHASTIC: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold one tile of one of the table's weights; see `fold_tile`.

    table int64: the first tile of every layer (LAYERS,), then a row (COLUMNS,) a layer, as `_table_row` lays it out.
    All matrices have the element type of `like` and are contiguous along K, lora_B aside.
    """
    tile = tl.program_id(0)
    first_tiles = tl.load(table_ptr + tl.arange(0, LAYERS))  # (LAYERS,) int64
    layer = tl.sum((first_tiles <= tile).to(tl.int32), axis=0) - 1
    row_ptr = table_ptr + LAYERS + layer * COLUMNS
    stride_type = tl.int64 if WIDE_OFFSETS else tl.int32
    weight_ptr = tl.load(row_ptr).to(like_ptr.dtype)
    out_ptr = tl.load(row_ptr + 1).to(like_ptr.dtype)
    a_ptr = tl.load(row_ptr + 2).to(like_ptr.dtype)
    b_ptr = tl.load(row_ptr + 3).to(like_ptr.dtype)
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
    if ALIGNED:  # what Triton would have seen in arguments of its own
        weight_ptr, out_ptr = tl.multiple_of(weight_ptr, 16), tl.multiple_of(out_ptr, 16)
        a_ptr, b_ptr = tl.multiple_of(a_ptr, 16), tl.multiple_of(b_ptr, 16)
        K = tl.multiple_of(K, 16)
        stride_wn, stride_on = tl.multiple_of(stride_wn, 16), tl.multiple_of(stride_on, 16)
        stride_ar = tl.multiple_of(stride_ar, 16)
    fold_tile(
        weight_ptr, out_ptr, a_ptr, b_ptr, index_ptr, tile - tl.load(table_ptr + layer).to(tl.int32), N, K, R, scale,
        seed, seed >> 32, stride_wn, 1, stride_on, 1, stride_ar, 1, stride_bn, stride_br,
        BLOCK_N, BLOCK_K, BLOCK_R, ONE_BLOCK, True, STOCHASTIC, WIDE_OFFSETS, PRECISION,
    )  # fmt: skip


def batches(folds: Sequence[Arguments]) -> list[list[Arguments]]:
    """Return the folds, those of one device, dtype and kind of rounding together: each list is one launch.

    What a table cannot hold goes alone: a matrix that is not contiguous along K, a fold without an index, and anything
    while a CUDA graph is being captured, which would replay the copy of a table that is gone.
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
        kind = weight.device, weight.dtype, seed is None, _is_aligned(arguments), _is_wide(arguments)
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
    # Wide stores under one predicate would run over a line's end into what lies between two lines.
    whole = weight.shape[1] % 16 == 0
    return whole and all(is_aligned(matrix) for matrix in (weight, out, lora_A)) and lora_B.data_ptr() % 16 == 0


def _is_wide(arguments: Arguments) -> bool:
    weight, lora_A, lora_B, *_, out = arguments
    return needs_wide_offsets(256, weight, lora_A, lora_B, out)


def _launch(group: Sequence[Arguments]) -> None:
    """Fold a group of one kind: all aligned or none, all with strides that need wide offsets or none."""
    aligned, wide = _is_aligned(group[0]), _is_wide(group[0])
    largest = max((arguments[0] for arguments in group), key=Tensor.numel)
    width = max(_width(arguments) for arguments in group)
    n, k = largest.shape
    shape = ShapeClass("fold", dtype_name(largest.dtype), n, k, n, width)
    blocks = find_blocks(FoldBlocks, shape, largest.device, aligned)
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
            BLOCK_N=blocks.block_n,
            BLOCK_K=blocks.block_k,
            BLOCK_R=blocks.block_r,
            LAYERS=layers,
            COLUMNS=COLUMNS,
            ONE_BLOCK=width <= blocks.block_r,
            ALIGNED=aligned,
            STOCHASTIC=group[0][5] is not None,
            WIDE_OFFSETS=wide,
            PRECISION=dot_precision(largest.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )


def _width(arguments: Arguments) -> int:
    index = arguments[3]
    return arguments[1].shape[0] if index is None else index.shape[0]


def _table_row(arguments: Arguments) -> list[int]:
    """Return what `fold_many_kernel` reads of one fold, the scale as the bits of an fp32."""
    weight, lora_A, lora_B, index, scale, seed, out = arguments
    pointers = [t.data_ptr() if t is not None else 0 for t in (weight, out, lora_A, lora_B, index)]
    sizes = [*weight.shape, _width(arguments)]
    strides = [weight.stride(0), out.stride(0), lora_A.stride(0), *lora_B.stride()]
    scale_bits = ctypes.c_int32.from_buffer(ctypes.c_float(scale)).value
    return [*pointers, *sizes, *strides, scale_bits, seed or 0, 0]
