"""A matmul with a low-rank side branch: out = in · main + bias + s·((in · down) ⊙ m) · up.

The forward and dX are the same computation with other matrices:

    forward   y  = x Wᵀ + bias + s((D(x) Aᵀ) ⊙ m) Bᵀ     in = x,  main = Wᵀ, down = Aᵀ, up = Bᵀ
    dX        dx = dY W        + s D'((dY B) ⊙ m) A       in = dY, main = W,  down = B,  up = A

so the same kernels serve both with different strides. The side product is in · down (`side_product.py`); dropout D
applies before it in the forward and after it in dX. `tuning.blocks.DESIGNS` lists the ways to compute it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from plora_kernels.kernels.launch import Dropout, has_wide_factors, layer_class
from plora_kernels.kernels.persistent_matmul import persistent_matmul, takes_descriptors
from plora_kernels.kernels.replay import empty
from plora_kernels.kernels.side_product import side_product
from plora_kernels.kernels.tile_matmul import tile_matmul
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import (
    ALGEBRA_DESIGNS,
    PERSISTENT_DESIGNS,
    SIDE_FIRST,
    SIDE_WITHIN,
    MatmulBlocks,
    for_wide_factors,
)
from plora_kernels.tuning.defaults import pointer_blocks
from plora_kernels.tuning.lookup import find_blocks


def find_matmul_blocks(
    op: str,
    inputs: Tensor,
    main: Tensor,
    down: Tensor,
    width: int,
    drop_out: Dropout | None = None,
    indexed: bool = False,
) -> MatmulBlocks:
    """Return the blocks and the design of out = inputs · main, whose side product inputs · down has `width` columns.

    `op`, the key of the lookup, is "forward" or "input_gradient". If tensor descriptors cannot load the matrices, or if
    torch's own matmuls would have to take modules by an index (`indexed`), the design is one with pointer loads. If
    `drop_out` masks the low-rank part of out, it is one whose tiles load the side product.
    """
    shape, aligned = layer_class(op, inputs, main, width)
    wide = has_wide_factors(inputs, down)
    blocks = find_blocks(MatmulBlocks, shape, inputs.device, aligned, wide_factors=wide)
    unfit = blocks.design in PERSISTENT_DESIGNS and not _takes_persistent(inputs, main)
    if unfit or (blocks.design in ALGEBRA_DESIGNS and (indexed or drop_out is not None)):
        blocks = _pointer_blocks(inputs, main, width, wide)
    return blocks if drop_out is None else _masking(blocks, drop_out)


def _masking(blocks: MatmulBlocks, dropout: Dropout) -> MatmulBlocks:
    """Return blocks of a design whose tiles load the side product, as those do that mask the low-rank part.

    More modules at a time would spill: more than 32, or 16 if each has to be looked up among the selected ones.
    """
    if blocks.design not in SIDE_FIRST:
        blocks = replace(blocks, design="two_launch" if blocks.design in PERSISTENT_DESIGNS else "tile_two_launch")
    return replace(blocks, block_r=min(blocks.block_r, 32 if dropout.selected is None else 16))


def adapted_matmul(
    inputs: Tensor,
    main: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    index: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
    drop_in: Dropout | None = None,
    drop_out: Dropout | None = None,
    side: Tensor | None = None,
    keep_side: bool,
    blocks: MatmulBlocks,
) -> tuple[Tensor, Tensor]:
    """Return `(out, side)`: out (M, D_OUT) = in · main + bias + s·side · up, side (M, R) = (in · down) ⊙ m.

    Shapes: inputs (M, D_IN), main (D_IN, D_OUT), down (D_IN, R), up (R, D_OUT), any strides; index int32 or None. down
    and up have the inputs' dtype, or fp32 and are rounded to it as they enter the products.
    `side` has one column per entry of the index, or per module without one, rounded to the inputs' dtype. If `side` is
    given, it is used and returned. Otherwise the returned one has no elements unless `keep_side` is set or the design
    stores it in memory anyway. `drop_in` drops elements of `in` for the side product, `drop_out` elements of the
    low-rank part of out, whose design must be one of SIDE_FIRST then.
    """
    (rows, _), d_out = inputs.shape, main.shape[1]
    width = down.shape[1] if index is None else index.shape[0]
    # Under dropout the side product is computed first: otherwise every tile of a row block would hash the mask again.
    by_algebra = blocks.design in ALGEBRA_DESIGNS
    if side is None and (drop_in is not None or blocks.design in SIDE_FIRST):
        # torch's matmul splits K where rows are few, and in float32 it is faster.
        by_torch = by_algebra and drop_in is None
        leads = blocks.dependent and blocks.design in PERSISTENT_DESIGNS
        if by_torch:
            side = inputs @ down.to(inputs.dtype)
        else:
            side = side_product(inputs, down, index=index, dropout=drop_in, leads=leads)
    if by_algebra and side is not None:
        up = up.to(inputs.dtype)  # torch's matmuls take one dtype
        if blocks.design == "algebra_first":
            # Not allocated by `replay.empty`: a call that contains torch's own matmuls is never replayed.
            whole = torch.empty((rows, d_out), dtype=inputs.dtype, device=inputs.device)
            start, beta = (whole, 0) if bias is None else (bias, 1)
            return torch.addmm(start, side, up, beta=beta, alpha=scale, out=whole).addmm_(inputs, main), side
        whole = inputs @ main if bias is None else torch.addmm(bias, inputs, main)
        return whole.addmm_(side, up, alpha=scale), side
    out = empty((rows, d_out), inputs.dtype, inputs.device)
    given = side is not None
    if side is None:
        stored = keep_side or blocks.design in SIDE_WITHIN
        side = empty((rows, width) if stored else (0,), inputs.dtype, inputs.device)
    if out.numel() == 0:
        return out, side
    if blocks.design in PERSISTENT_DESIGNS:
        persistent_matmul(
            out, side, inputs, main, down, up,
            bias=bias, index=index, dropout=drop_out, scale=scale, side_given=given, keep_side=keep_side, blocks=blocks,
        )  # fmt: skip
    else:
        tile_matmul(
            out, side, inputs, main, down, up,
            bias=bias, index=index, dropout=drop_out, scale=scale, side_given=given, keep_side=keep_side, blocks=blocks,
        )  # fmt: skip
    return out, side


def _pointer_blocks(inputs: Tensor, main: Tensor, width: int, wide_factors: bool) -> MatmulBlocks:
    """Return blocks for pointer loads, used if those found are for another design."""
    hardware = lookup.hardware_of(inputs.device)
    shape, aligned = layer_class("forward", inputs, main, width)  # for dX too: its defaults are the same
    blocks = pointer_blocks(shape, hardware, aligned)
    return for_wide_factors(blocks, shape, hardware.capability) if wide_factors else blocks


def _takes_persistent(inputs: Tensor, main: Tensor) -> bool:
    """Say whether tensor descriptors can load both matrices and store their product, a row-major tensor."""
    lines = main.shape[1] * inputs.element_size() % 16 == 0
    return lines and inputs.stride(1) == 1 and inputs.shape[1] > 0 and takes_descriptors(inputs, main)
