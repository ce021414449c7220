"""The adapted matmul of groups of rows: out_g = in_g · main_g + bias_g + s_g·((in_g · down_g) ⊙ m_g) · up_g.

This is `adapted_matmul` for groups, for the forward and dX; in · down is the side product (`side_product.py`). main and
bias are shared or each group's own. All rows of a tile belong to one group, and the tile loads that group's matrices
only. Rows are not padded: the tile at the end of a group is masked.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from plora_kernels.kernels.grouped_tiles import Groups
from plora_kernels.kernels.launch import Dropout, has_wide_factors, layer_class
from plora_kernels.kernels.replay import empty
from plora_kernels.kernels.side_product import side_product
from plora_kernels.kernels.tile_matmul import tile_matmul
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import MatmulBlocks, for_wide_factors, tile
from plora_kernels.tuning.defaults import pointer_blocks
from plora_kernels.tuning.lookup import find_blocks


def find_grouped_blocks(
    op: str, inputs: Tensor, main: Tensor, down: Tensor, groups: Groups, width: int, drop_out: Dropout | None
) -> MatmulBlocks:
    """Return blocks for out = inputs · main with `width` side columns, with pointer loads and block_m of a mean group.

    They are looked up for the rows of all groups together, because all groups share the launch that fills the device.
    `op` is "forward" or "input_gradient". Blocks measured for a design other than "tile" are replaced by the default.
    """
    shape, aligned = layer_class(op, inputs, main if main.dim() == 2 else main[0], width)
    aligned = aligned and (main.dim() == 2 or main.stride(0) % 16 == 0)
    wide, hardware = has_wide_factors(inputs, down), lookup.hardware_of(inputs.device)
    blocks = find_blocks(MatmulBlocks, shape, inputs.device, aligned, wide_factors=wide)
    if blocks.design != "tile":
        blocks = pointer_blocks(shape, hardware, aligned)
        if wide:
            blocks = for_wide_factors(blocks, shape, hardware.capability)
    block_m, block_n = tile(shape.m // max(1, groups.total), blocks.block_m), blocks.block_n
    block_k, by_number = blocks.block_k, drop_out is not None and drop_out.numbers is not None
    warps, stages = blocks.num_warps, blocks.num_stages
    if inputs.dtype is torch.float32:
        # The group arguments take a few more registers, so a third stage would spill.
        stages = min(stages, 2)
        if main.dim() == 3 and block_m * block_n >= 64 * 64:
            # The offset of a group's own matrix takes another register, so larger tiles would spill.
            block_m, block_n = (32 if width > blocks.block_r else block_m, 32) if aligned else (32, block_n)
        if by_number:
            block_n = min(block_n, 32)  # loading the rows' numbers takes a register, and a wider tile would spill
    elif aligned and block_m * block_n < 128 * 128:
        warps = 4
    if wide and by_number:
        block_k = min(block_k, 64)  # the same register, beside offsets of fp32 factors: sm_100 would spill
    return replace(blocks, block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages)


def grouped_matmul(
    inputs: Tensor,
    main: Tensor,
    down: Tensor,
    up: Tensor,
    groups: Groups,
    *,
    op: str,
    index: Tensor | None,
    keep_side: bool,
    bias: Tensor | None = None,
    drop_in: Dropout | None = None,
    drop_out: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(out, side)`: out (M, D_OUT) and side (M, W or R).

    side has no elements, unless `keep_side` is set or a launch of its own computed it. Shapes: inputs (M, D_IN), main
    (D_IN, D_OUT) and bias (D_OUT,), or one a group (C, D_IN, D_OUT) and (C, D_OUT), down (C, D_IN, R), up
    (C, R, D_OUT), any strides, the last two in the inputs' dtype or fp32; index (C, W) int32 or None. `drop_in` drops
    elements of `inputs` for the side product, `drop_out` elements of the low-rank part of out.
    """
    (rows, _), d_out = inputs.shape, main.shape[-1]
    width = down.shape[2] if index is None else index.shape[1]
    out = empty((rows, d_out), inputs.dtype, inputs.device)
    blocks = find_grouped_blocks(op, inputs, main, down, groups, width, drop_out)
    # The side product is computed first if otherwise every tile would load `inputs` again, for a second block of
    # modules, or hash the dropout mask again, and if the tiles mask its product. One without columns is given too,
    # which saves the tiles a product.
    given = drop_in is not None or drop_out is not None or width > blocks.block_r or (width == 0 and main.dim() == 3)
    if given:
        side = side_product(inputs, down, index=index, dropout=drop_in, groups=groups)
    else:
        side = empty((rows, width) if keep_side else (0,), inputs.dtype, inputs.device)
    if out.numel() == 0:
        return out, side
    tile_matmul(
        out, side, inputs, main, down, up, groups=groups,
        bias=bias, index=index, dropout=drop_out, scale=groups.scale, side_given=given, keep_side=keep_side,
        blocks=blocks,
    )  # fmt: skip
    return out, side
