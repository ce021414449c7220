"""Blocks for fp32 factors beside half precision: their shared memory by hand, and which blocks change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import (
    Blocks,
    FoldBlocks,
    GradientBlocks,
    Hardware,
    MatmulBlocks,
    OutputGradientBlocks,
    ShapeClass,
    SideBlocks,
    beside_product,
    for_wide_factors,
    shared_bytes,
    staged_bytes,
)
from plora_kernels.tuning.candidates import candidates

CPU = torch.device("cpu")
TILE = MatmulBlocks("tile", 128, 128, 64, 64, 8, 8, 3)


def shape(rank: int, op: str = "forward") -> ShapeClass:
    return ShapeClass(op, "bfloat16", 8192, 4096, 4096, rank)


@pytest.mark.parametrize(
    ("blocks", "same", "wide"),
    [
        # x: 3 · 2 · 128 · (64 + …); the factor: 3 tiles of 2-byte numbers, or two of 4-byte ones and one rounded.
        (SideBlocks(64, 128, 16, 4, 3), 3 * 2 * 128 * 64 + 6 * 128 * 16, 3 * 2 * 128 * 64 + 10 * 128 * 16),
        (TILE, 3 * 2 * 64 * 256 + 6 * 64 * 64, 3 * 2 * 64 * 256 + 10 * 64 * 64),
        # No factor is loaded in the main loop.
        (replace(TILE, design="tile_two_launch"), 3 * 2 * 64 * 256, 3 * 2 * 64 * 256),
        (OutputGradientBlocks(64, 128, 16, 2, 4, 3), 3 * 2 * 64 * 144, 3 * 2 * 64 * 144),
        (GradientBlocks(64, 128, 16, 2, 4, 3), 3 * 2 * 64 * 144, 3 * 2 * 64 * 144),
        (FoldBlocks(64, 128, 16, 4, 2), 0, 0),
    ],
)
def test_shared_memory_by_hand(blocks: Blocks, same: int, wide: int) -> None:
    assert staged_bytes(blocks, "bfloat16") == same
    assert staged_bytes(blocks, "bfloat16", wide_factors=True) == wide


@pytest.mark.parametrize(
    ("blocks", "changed"),
    [
        # Five stages of a table's entry for 64 modules take 163,840 bytes, and 229,376 with fp32 factors.
        (SideBlocks(64, 128, 64, 4, 5), {"num_stages": 4}),
        (SideBlocks(32, 128, 16, 4, 5), {}),
        (TILE, {}),
        (replace(TILE, design="two_launch", block_n=256), {}),
        # A fold's numbers are multiplied in parts, which take registers.
        (FoldBlocks(64, 128, 64, 4, 2), {"block_k": 64}),
        (FoldBlocks(128, 256, 16, 8, 2), {"block_n": 64, "block_k": 128}),
        (FoldBlocks(64, 64, 64, 4, 2), {}),
        (FoldBlocks(32, 128, 64, 4, 2), {"block_r": 16}),
    ],
)
def test_what_changes_on_a_hopper(blocks: Blocks, changed: dict[str, int]) -> None:
    assert for_wide_factors(blocks, shape(64), 90) == replace(blocks, **changed)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (FoldBlocks(64, 128, 64, 4, 2), FoldBlocks(64, 128, 16, 4, 2)),
        (FoldBlocks(64, 128, 16, 4, 2), FoldBlocks(64, 128, 16, 4, 2)),
        (FoldBlocks(128, 256, 64, 8, 2), FoldBlocks(64, 128, 16, 8, 2)),
    ],
)
def test_a_fold_on_a_later_gpu_adds_few_modules_at_a_time(blocks: FoldBlocks, expected: FoldBlocks) -> None:
    assert for_wide_factors(blocks, shape(64), 100) == expected


def test_large_tiles_add_fewer_of_many_modules_at_a_time() -> None:
    large, small = (MatmulBlocks("two_launch", 128, block_n, 64, 32, 8, 8, 3) for block_n in (256, 128))
    assert for_wide_factors(large, shape(65), 90) == replace(large, block_r=16)
    assert for_wide_factors(large, shape(64), 90) == large
    assert for_wide_factors(small, shape(65), 90) == small
    assert for_wide_factors(small, shape(33), 80) == replace(small, block_r=16)
    assert for_wide_factors(small, shape(32), 80) == small


def test_where_b_is_held_in_registers_more_warps_hold_it() -> None:
    blocks = OutputGradientBlocks(64, 256, 64, 2, 4, 3)
    assert for_wide_factors(blocks, shape(64), 80) == replace(blocks, block_n=128, num_warps=8)
    assert for_wide_factors(blocks, shape(64), 90) == blocks
    narrow = replace(blocks, block_n=128, block_r=32)
    assert for_wide_factors(narrow, shape(64), 80) == narrow


@pytest.mark.parametrize("capability", [0, 75, 80, 89, 120])
def test_folds_elsewhere_have_the_tiles_of_fp32_weights(capability: int) -> None:
    assert for_wide_factors(FoldBlocks(64, 128, 64, 4, 2), shape(64), capability) == FoldBlocks(32, 128, 16, 4, 2)
    assert for_wide_factors(FoldBlocks(16, 64, 32, 4, 2), shape(64), capability) == FoldBlocks(16, 64, 16, 4, 2)


@pytest.mark.parametrize(
    "hardware", [Hardware(90, 132), Hardware(80, 108), Hardware(86, 84), Hardware(0, 304)], ids=str
)
@pytest.mark.parametrize("op", ["side_product", "forward", "projections_forward"])
def test_what_fits_with_half_precision_fits_with_wide_factors(op: str, hardware: Hardware) -> None:
    limit = shared_bytes(hardware.capability)
    known = candidates(shape(64, op), hardware)
    for blocks in known:
        wide = for_wide_factors(blocks, shape(64, op), hardware.capability)
        assert 1 <= wide.num_stages <= blocks.num_stages
        assert staged_bytes(wide, "bfloat16", wide_factors=True) <= limit
        if wide.num_stages < blocks.num_stages:  # one stage more would not fit
            more = replace(wide, num_stages=wide.num_stages + 1)
            assert staged_bytes(more, "bfloat16", wide_factors=True) > limit
    assert any(for_wide_factors(blocks, shape(64, op), hardware.capability) != blocks for blocks in known)


@pytest.mark.parametrize(("block_r", "stages"), [(16, 4), (32, 3), (64, 2)])
def test_a_side_product_of_wide_factors_fits_beside_a_product(block_r: int, stages: int) -> None:
    beside = beside_product(SideBlocks(32, 128, block_r, 4, 5), "bfloat16", wide_factors=True)
    assert beside == SideBlocks(64, 64, block_r, 4, stages)
    # As in the test of what runs beside a product of half precision: 180,248 bytes are taken.
    assert staged_bytes(beside, "bfloat16", wide_factors=True) + 180_248 + 2 * 1024 <= 228 * 1024


def test_forced_blocks_and_defaults_are_changed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "capability_of", lambda device: 90)
    wanted, forced = shape(64, "side_product"), SideBlocks(64, 128, 64, 4, 5)
    with lookup.override_blocks({"side_product": forced}), lookup.record_blocks() as taken:
        assert lookup.find_blocks(SideBlocks, wanted, CPU, True) == forced
        found = lookup.find_blocks(SideBlocks, wanted, CPU, True, wide_factors=True)
    assert taken["side_product"] == found == replace(forced, num_stages=4)
