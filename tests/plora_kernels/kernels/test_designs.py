"""Every design of the forward and the backward against float64, forced upon shapes that it must leave or mask."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plora_kernels as pk
from plora_kernels.kernels import adapted_matmul, tile_matmul
from plora_kernels.kernels.replay import launch
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import (
    DESIGNS,
    OVERLAPS,
    PERSISTENT_DESIGNS,
    Blocks,
    Hardware,
    MatmulBlocks,
    OutputGradientBlocks,
    SideBlocks,
)
from tests.plora_kernels.ops.test_numerics import DEVICE, check
from tests.support.groups import check_groups, draw_grouped
from tests.support.numerics import Problem, make_problem, random_mask
from tests.support.pairwise import pairwise

# The blocks of TMA are at least 16 bytes wide; sizes are small, so that edges fall inside tiles.
DTYPES = [torch.float16, torch.float32]


def blocks_of(design: str, block_r: int) -> dict[str, Blocks]:
    rows = 128 if design == "specialised" else 32  # two groups of warps, 64 rows each
    matmul = MatmulBlocks(design, rows, 32, 16, block_r, 2, 4, 2)
    return {
        "forward": matmul,
        "input_gradient": matmul,
        "side_product": SideBlocks(16, 16, block_r, 4, 2),
        "output_gradient": OutputGradientBlocks(16, 32, block_r, 6, 4, 2),
    }


def run_design(design: str, problem: Problem, block_r: int = 16) -> None:
    with lookup.override_blocks(blocks_of(design, block_r)):
        check(problem)


@pytest.fixture(autouse=True)
def on_kernels(kernels: None, nan_filled: None) -> None:
    """Run on the kernels, every output filled with NaN first."""


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the design of every launch that walks over tiles."""
    designs: list[str] = []

    def counting(real: Callable[..., None]) -> Callable[..., None]:
        def counted(*tensors: torch.Tensor, blocks: MatmulBlocks, **options: object) -> None:
            designs.append(blocks.design)
            real(*tensors, blocks=blocks, **options)

        return counted

    for name in ("persistent_matmul", "specialised_matmul"):
        monkeypatch.setattr(adapted_matmul, name, counting(getattr(adapted_matmul, name)))
    return designs


SHAPES = [(1, 16, 16, 1), (37, 48, 80, 5), (70, 104, 40, 17), (64, 64, 64, 33)]  # rows, K, N, R


@pytest.mark.parametrize(
    ("design", "shape", "form", "dtype", "bias"),
    pairwise(DESIGNS, SHAPES, [None, "folded", "frozen"], DTYPES, [False, True]),
)
def test_designs_are_within_the_bound(
    design: str, shape: tuple[int, int, int, int], form: str | None, dtype: torch.dtype, bias: bool, walks: list[str]
) -> None:
    rank = shape[-1]
    mask = None if form is None else random_mask(rank, rank).to(DEVICE)
    problem = make_problem(*shape, dtype, mask=mask, unselected=form or "folded", bias=bias, seed=rank, device=DEVICE)
    run_design(design, problem)
    # Lines of 1, 5, 17 or 33 modules are not what a descriptor fetches.
    walking = "two_launch" if design == "specialised" else design
    assert walks == [walking] * (2 if design in PERSISTENT_DESIGNS else 0)


@pytest.mark.parametrize(
    ("rows", "k", "n", "rank", "bias"), [(1, 16, 16, 8, False), (300, 104, 168, 16, True), (128, 64, 64, 40, False)]
)
def test_warps_of_two_kinds_are_within_the_bound(
    rows: int, k: int, n: int, rank: int, bias: bool, walks: list[str]
) -> None:
    for form in (None, "frozen"):
        mask = None if form is None else random_mask(rank, rank).to(DEVICE)
        run_design(
            "specialised",
            make_problem(
                rows, k, n, rank, torch.float16, mask=mask, unselected=form or "folded", bias=bias, seed=rank,
                device=DEVICE,
            ),
        )  # fmt: skip
    assert walks == ["specialised"] * 4


@pytest.mark.parametrize("what", ["float32", "an index", "tiles of 64 rows"])
def test_what_warps_of_two_kinds_do_not_take_is_walked_over(what: str, walks: list[str]) -> None:
    mask = random_mask(16, 16).to(DEVICE) if what == "an index" else None
    dtype = torch.float32 if what == "float32" else torch.float16
    blocks = blocks_of("specialised", 16)
    if what == "tiles of 64 rows":
        matmul = MatmulBlocks("specialised", 64, 32, 16, 16, 2, 4, 2)
        blocks |= {"forward": matmul, "input_gradient": matmul}
    with lookup.override_blocks(blocks):
        check(make_problem(70, 48, 80, 16, dtype, mask=mask, seed=1, device=DEVICE))
    assert walks == ["two_launch"] * 2


@pytest.mark.parametrize("design", DESIGNS)
def test_dropout_in_every_design(design: str) -> None:
    for form in ("folded", "frozen"):
        mask = random_mask(5, 3).to(DEVICE)
        run_design(
            design,
            make_problem(
                37, 48, 80, 5, torch.float32, mask=mask, unselected=form, dropout_p=0.4, seed=5, device=DEVICE
            ),
        )


@pytest.mark.parametrize("design", PERSISTENT_DESIGNS)
def test_what_descriptors_cannot_fetch_takes_pointer_loads(design: str, walks: list[str]) -> None:
    run_design(design, make_problem(7, 50, 29, 5, torch.float16, device=DEVICE))
    assert walks == []


def test_side_tiles_come_first_at_every_launch(walks: list[str]) -> None:
    for rows in (70, 16, 100):
        run_design("one_launch", make_problem(rows, 48, 80, 20, torch.float32, seed=rows, device=DEVICE))
    assert walks == ["one_launch"] * 6


@pytest.mark.parametrize(
    ("design", "overlap", "rank", "form"),
    [(*one, *other) for *one, other in pairwise(PERSISTENT_DESIGNS, OVERLAPS[1:], [(5, None), (33, "frozen")])],
)
def test_overlapping_tiles_are_within_the_bound(
    design: str, overlap: str, rank: int, form: str | None, walks: list[str]
) -> None:
    blocks = blocks_of(design, 16)
    for op in ("forward", "input_gradient"):
        matmul = blocks[op]
        assert isinstance(matmul, MatmulBlocks)
        blocks[op] = replace(matmul, overlap=overlap, resident=2, dependent=True, gradient_beside=True)
    mask = None if form is None else random_mask(rank, rank).to(DEVICE)
    with lookup.override_blocks(blocks):
        check(
            make_problem(
                70, 48, 104, rank, torch.float16, mask=mask, unselected=form or "folded", bias=True, seed=rank,
                device=DEVICE,
            )
        )  # fmt: skip
    assert walks == ["two_launch" if design == "specialised" else design] * 2


# Twelve tiles: of five programs, two have a tile more than the others, and wait for side tiles.
@pytest.mark.parametrize("programs", [1, 3, 5])
def test_any_number_of_programs_covers_all_tiles(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "multiprocessors_of", lambda device: programs)
    for design in PERSISTENT_DESIGNS:
        run_design(design, make_problem(70, 48, 104, 5, torch.float32, device=DEVICE))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let the blocks be those of an sm_90 without a table, as large as they are there."""
    monkeypatch.setenv("PLORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(lookup, "PACKAGED", tmp_path)
    monkeypatch.setattr(lookup, "hardware_of", lambda device: Hardware(90, 2))
    monkeypatch.setattr(lookup, "multiprocessors_of", lambda device: 2)
    lookup.forget_tables()
    yield
    monkeypatch.undo()
    lookup.forget_tables()


@pytest.mark.parametrize("form", [None, "folded", "frozen"])
@pytest.mark.parametrize(("rank", "dropout_p"), [(5, 0.0), (20, 0.0), (5, 0.3)])
@pytest.mark.usefixtures("hopper")
def test_what_a_hopper_takes_by_default(rank: int, dropout_p: float, form: str | None, walks: list[str]) -> None:
    mask = None if form is None else random_mask(rank, rank).to(DEVICE)
    check(
        make_problem(
            200, 64, 528, rank, torch.float16, mask=mask, unselected=form or "folded", dropout_p=dropout_p, seed=rank,
            device=DEVICE,
        )
    )  # fmt: skip
    width = rank if form != "folded" else int(random_mask(rank, rank).sum())
    design = "two_launch" if width > 16 else "persistent"
    # The dX of dropout masks what it adds, in tiles of pointer loads.
    assert walks == [design] * (1 if dropout_p else 2)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_groups_take_pointer_loads_and_under_a_mask_no_large_tiles(
    dropout_p: float, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles: list[int] = []

    def noted(kernel: object, grid: tuple[int, ...], *arguments: object, **named: int) -> None:
        if kernel is tile_matmul.tile_matmul_kernel:
            tiles.append(named["BLOCK_M"] * named["BLOCK_N"])
        launch(kernel, grid, *arguments, **named)

    monkeypatch.setattr(tile_matmul, "launch", noted)
    wide = MatmulBlocks("tile", 128, 256, 64, 16, 8, 8, 3)
    with lookup.override_blocks({"forward": wide, "input_gradient": wide} if measured else {}):
        check_groups(draw_grouped((130, 0, 270), 272, 528, 5, torch.float16, dropout_p=dropout_p, device=DEVICE))
    large, small = 128 * 256, 128 * 128
    assert tiles == ([large, small if dropout_p else large] if measured else [small, small])


def test_partial_gradients_are_the_same_bits_every_time() -> None:
    problem = make_problem(130, 48, 80, 5, torch.float16, device=DEVICE)
    with lookup.override_blocks(blocks_of("two_launch", 16)):
        from tests.plora_kernels.ops.test_numerics import run

        first, second = run(problem), run(problem)
    for a, b in zip(first, second, strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_of_no_rows_are_zero(design: str) -> None:
    x, lora_A, lora_B = (torch.zeros(s, requires_grad=True) for s in ((0, 16), (4, 16), (32, 4)))
    with lookup.override_blocks(blocks_of(design, 16)):
        pk.plora_linear(x, torch.zeros(32, 16), lora_A, lora_B).sum().backward()
    assert lora_A.grad is not None
    assert lora_B.grad is not None
    assert not lora_A.grad.any()
    assert not lora_B.grad.any()


@pytest.mark.parametrize("dropout", [(0.0, None), (0.3, torch.tensor([5]))], ids=["plain", "dropout"])
@pytest.mark.parametrize("design", DESIGNS)
def test_the_side_product_is_kept_if_asked_for_alone(design: str, dropout: tuple[float, torch.Tensor | None]) -> None:
    x, weight, lora_A, lora_B = (torch.randn(s) for s in ((8, 16), (32, 16), (4, 16), (32, 4)))
    with lookup.override_blocks(blocks_of(design, 16)):
        for keep in (False, True):
            _, s = torch.ops.plora.linear(x, weight, lora_A, lora_B, None, None, 1.0, False, keep, *dropout)
            assert s.shape == ((8, 4) if keep else (0,))


def test_dropout_in_dx_takes_blocks_made_for_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[MatmulBlocks] = []
    real = tile_matmul.tile_matmul
    monkeypatch.setattr(
        adapted_matmul, "tile_matmul", lambda *t, blocks, **o: (taken.append(blocks), real(*t, blocks=blocks, **o))
    )
    problem = make_problem(37, 48, 80, 5, torch.float32, dropout_p=0.4, seed=5, device=DEVICE)
    forced = blocks_of("one_launch", 16)
    with lookup.override_blocks(forced):
        check(problem)
    assert [blocks.design for blocks in taken] == ["tile"]
    assert forced["input_gradient"] not in taken


SETTINGS = {
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = False": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}
# What is set stays set in its process: each setting gets a child of one process, which imports torch for all.
IN_CHILDREN = """
import os, sys, torch
from plora_kernels.kernels.launch import dot_precision
for setting in sys.argv[1:]:
    child = os.fork()
    if not child:
        found = [dot_precision(torch.float32)]
        exec(setting)
        print(*found, dot_precision(torch.float32), dot_precision(torch.float16), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""


def test_fp32_products_are_as_precise_as_torchs() -> None:
    newer = hasattr(torch.backends, "fp32_precision")
    settings = {setting: found for setting, found in SETTINGS.items() if newer or "fp32_precision" not in setting}
    command = [sys.executable, "-c", IN_CHILDREN, *settings]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(zip(settings, result.stdout.splitlines(), strict=True))
    assert found == {setting: f"ieee {precision} ieee" for setting, precision in settings.items()}
