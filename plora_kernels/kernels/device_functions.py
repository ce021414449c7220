"""Device functions of several kernels: module indices, the low-rank product, dropout's mask, the K loop of a tile.

Side product: S = D(x) Aᵀ or dS = dY B, see `side_product.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plora_kernels.kernels.counter_rng import element_words


@triton.jit
def load_modules(index_ptr, r0, R, BLOCK_R: tl.constexpr, offset_type: tl.constexpr):
    """Return the modules of columns r0 … r0+BLOCK_R−1 of a side product, and which of them exist: (BLOCK_R,) each."""
    places = r0 + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    present = places < R
    if index_ptr is not None:
        modules = tl.load(index_ptr + places, mask=present, other=-1)
        present = modules >= 0
        modules = tl.where(present, modules, 0).to(offset_type)
    else:
        modules = places.to(offset_type)
    return modules, present


@triton.jit
def are_selected(selected_ptr, selected_width, modules, SELECTED_BLOCK: tl.constexpr):
    """Return which of `modules` (BLOCK_R,) are in an index of selected_width entries; −1 is no module."""
    places = tl.arange(0, SELECTED_BLOCK)
    entries = tl.load(selected_ptr + places, mask=places < selected_width, other=-1)  # (SELECTED_BLOCK,)
    return tl.max((entries[None, :] == modules[:, None]).to(tl.int32), axis=1) > 0


@triton.jit
def add_scaled_product(side, up, acc, scale, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + s · side · up: side (BLOCK_M, BLOCK_R) fp32, up (BLOCK_R, BLOCK_N), acc (BLOCK_M, BLOCK_N) fp32.

    `up` is in `dtype` or in fp32, of which every element is rounded to `dtype` here.
    """
    if dtype == tl.float16:
        # side · s may exceed fp16's 65504 where neither side nor the result does, so the scale goes to `up`.
        product = tl.dot(side.to(dtype), (up.to(tl.float32) * scale).to(dtype), acc, input_precision=PRECISION)
    else:
        # One rounding less than above.
        product = tl.dot((side * scale).to(dtype), up.to(dtype), acc, input_precision=PRECISION)
    return product


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the tile row and column of an output tile; tiles are ordered in groups of GROUP_M rows.

    Programs of a group load the same columns of the main matrix, which stay in the L2 cache.
    """
    group_width = GROUP_M * tiles_n
    first_m = (tile // group_width) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % group_width) % group_m, (tile % group_width) // group_m


@triton.jit
def store_side(side_base, side, rows, row_ok, r0, R, stride_sm, BLOCK_R: tl.constexpr):
    """Store columns r0 … r0+BLOCK_R−1 of the side product: (BLOCK_M, BLOCK_R)."""
    places = r0 + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    side_offsets = rows[:, None] * stride_sm + places[None, :]
    tl.store(side_base + side_offsets, side, mask=row_ok[:, None] & (places < R)[None, :])


@triton.jit
def load_side(side_base, rows, row_ok, r0, R, stride_sm, BLOCK_R: tl.constexpr):
    """Return columns r0 … r0+BLOCK_R−1 of the side product as fp32: (BLOCK_M, BLOCK_R)."""
    places = r0 + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    side_offsets = rows[:, None] * stride_sm + places[None, :]
    # ".cg" bypasses the L1 cache: another multiprocessor may have written these values in this launch.
    ok = row_ok[:, None] & (places < R)[None, :]
    side = tl.load(side_base + side_offsets, mask=ok, other=0.0, cache_modifier=".cg")
    return side.to(tl.float32)


@triton.jit
def keep_mask(seed_ptr, numbers, first_column, threshold, BLOCK_N: tl.constexpr):
    """Return which elements of a (BLOCK_M, BLOCK_N) tile dropout keeps, the same as `plora_kernels.counter_rng` keeps.

    numbers (BLOCK_M,): the rows' numbers in the mask.
    """
    seed = tl.load(seed_ptr)
    words = element_words(seed, seed >> 32, numbers, first_column + tl.arange(0, BLOCK_N))
    return words.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def masked_low_rank(
    side_base,
    up_base,
    index_ptr,
    seed_ptr,
    selected_ptr,
    selected_width,
    numbers,
    rows,
    columns,
    row_ok,
    column_ok,
    first_column,
    R,
    end,
    scale,
    keep_scale,
    threshold,
    stride_ur,
    stride_uo,
    stride_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
    offset_type: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return D'(s · side · up) of a tile, (BLOCK_M, BLOCK_N) fp32: dropped elements are 0, the others times keep_scale.

    With SELECTED_BLOCK, D' applies only to the modules that `selected` names. side (·, R) is loaded; `end` is R, or R
    rounded up to a multiple of BLOCK_R, which may be constant. numbers (BLOCK_M,) are the rows' numbers in the mask.
    A matmul that starts with this result needs no other accumulator for what is masked.
    """
    low = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, end, BLOCK_R):
        modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, offset_type)
        side = load_side(side_base, rows, row_ok, r0, R, stride_sm, BLOCK_R)
        if SELECTED_BLOCK > 0:
            side = tl.where(are_selected(selected_ptr, selected_width, modules, SELECTED_BLOCK)[None, :], side, 0.0)
        up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
        u = tl.load(up_base + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
        low = add_scaled_product(side, u, low, scale * keep_scale, dtype, PRECISION)
    low = tl.where(keep_mask(seed_ptr, numbers, first_column, threshold, BLOCK_N), low, 0.0)
    if SELECTED_BLOCK > 0:
        for r0 in range(0, end, BLOCK_R):
            modules, module_ok = load_modules(index_ptr, r0, R, BLOCK_R, offset_type)
            side = load_side(side_base, rows, row_ok, r0, R, stride_sm, BLOCK_R)
            side = tl.where(are_selected(selected_ptr, selected_width, modules, SELECTED_BLOCK)[None, :], 0.0, side)
            up_offsets = modules[:, None] * stride_ur + columns[None, :] * stride_uo
            u = tl.load(up_base + up_offsets, mask=module_ok[:, None] & column_ok[None, :], other=0.0)
            low = add_scaled_product(side, u, low, scale, dtype, PRECISION)
    return low


@triton.jit
def multiply(
    acc,
    in_base,
    main_base,
    down_base,
    rows,
    columns,
    depth,
    modules,
    row_ok,
    column_ok,
    module_ok,
    D_IN,
    stride_im,
    stride_id,
    stride_wd,
    stride_wo,
    stride_dd,
    stride_dr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SIDE_GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run the K loop of a tile; return acc + in · main (BLOCK_M, BLOCK_N) and in · down (BLOCK_M, BLOCK_R).

    All three are fp32. `down` is in the dtype of `in` or in fp32: its tiles are rounded as they are loaded. Bases point
    to the tile's first row, first column and first module; rows (BLOCK_M,), columns (BLOCK_N,), depth (BLOCK_K,) and
    modules (BLOCK_R,) are offsets from there, in 32 bits where that suffices, and the masks `*_ok` say which exist.
    With SIDE_GIVEN the side product is not computed, and zeros are returned for it.
    """
    in_offsets = rows[:, None] * stride_im + depth[None, :] * stride_id
    main_offsets = depth[:, None] * stride_wd + columns[None, :] * stride_wo
    down_offsets = depth[:, None] * stride_dd + modules[None, :] * stride_dr
    in_step = tl.full((), BLOCK_K, tl.int64) * stride_id
    main_step = tl.full((), BLOCK_K, tl.int64) * stride_wd
    down_step = tl.full((), BLOCK_K, tl.int64) * stride_dd
    # The loop advances offsets, not pointers. Where some of its loads are pipelined and others are not, Triton 3.6
    # advances a loop's pointers once more after it, which does not compile for AMD GPUs.
    down_start = tl.full((), 0, tl.int64)
    in_start, main_start = down_start, down_start
    side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, D_IN, BLOCK_K):
        depth_ok = depth < D_IN - k
        a = tl.load(
            in_base + in_start + in_offsets, mask=row_ok[:, None] & depth_ok[None, :], other=0.0
        )  # (BLOCK_M, BLOCK_K)
        w = tl.load(
            main_base + main_start + main_offsets, mask=depth_ok[:, None] & column_ok[None, :], other=0.0
        )  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N) fp32
        if not SIDE_GIVEN:
            d = tl.load(
                down_base + down_start + down_offsets, mask=depth_ok[:, None] & module_ok[None, :], other=0.0
            )  # (BLOCK_K, BLOCK_R)
            side = tl.dot(a, d.to(a.dtype), side, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) fp32
            down_start += down_step
        in_start += in_step
        main_start += main_step
    return acc, side
