"""Every design of forward and backward against float64, also on shapes it must mask or leave to another design."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plora_kernels as pk
from plora_kernels.kernels import adapted_matmul, tile_matmul
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import (
    DESIGNS,
    PERSISTENT_DESIGNS,
    Blocks,
    Hardware,
    MatmulBlocks,
    OutputGradientBlocks,
    SideBlocks,
)
from tests.support.equality import assert_equal
from tests.support.groups import draw_grouped
from tests.support.notes import note_calls
from tests.support.numerics import Problem, check, in_form, make_problem, run
from tests.support.pairwise import pairwise
from tests.support.tiers import slow

# Rows of TMA's blocks have at least 16 bytes; sizes are small, so that edges fall inside tiles.
DTYPES = [torch.float16, torch.float32]


def blocks_of(design: str, block_r: int) -> dict[str, Blocks]:
    matmul = MatmulBlocks(design, 32, 32, 16, block_r, 2, 4, 2)
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
def persistent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the design of every launch of a persistent kernel."""
    designs: list[str] = []
    note_calls(
        monkeypatch, adapted_matmul, "persistent_matmul", lambda *tensors, blocks, **options: blocks.design, designs
    )
    return designs


SHAPES = [(1, 16, 16, 1), (37, 48, 80, 5), (70, 104, 40, 17), (64, 64, 64, 33)]  # rows, K, N, R


@pytest.mark.parametrize(
    ("design", "shape", "form", "dtype", "bias"),
    pairwise(DESIGNS, SHAPES, [None, "folded", "frozen"], DTYPES, [False, True]),
)
def test_designs_are_within_the_bound(
    design: str,
    shape: tuple[int, int, int, int],
    form: str | None,
    dtype: torch.dtype,
    bias: bool,
    persistent: list[str],
) -> None:
    rank = shape[-1]
    run_design(design, make_problem(*shape, dtype, **in_form(form, rank, rank), bias=bias, seed=rank))
    assert persistent == [design] * (2 if design in PERSISTENT_DESIGNS else 0)


@pytest.mark.parametrize("design", DESIGNS)
def test_dropout_in_every_design(design: str) -> None:
    for form in ("folded", "frozen"):
        run_design(design, make_problem(37, 48, 80, 5, torch.float32, **in_form(form, 5, 3), dropout_p=0.4, seed=5))


@pytest.mark.parametrize("design", PERSISTENT_DESIGNS)
def test_what_descriptors_cannot_fetch_takes_pointer_loads(design: str, persistent: list[str]) -> None:
    run_design(design, make_problem(7, 50, 29, 5, torch.float16))
    assert persistent == []


def test_side_tiles_come_first_at_every_launch(persistent: list[str]) -> None:
    for rows in (70, 16, 100):
        run_design("one_launch", make_problem(rows, 48, 80, 20, torch.float32, seed=rows))
    assert persistent == ["one_launch"] * 6


@pytest.mark.parametrize("design", PERSISTENT_DESIGNS)
@pytest.mark.parametrize(("rank", "form"), [(5, None), (33, "frozen")])
def test_overlapping_tiles_are_within_the_bound(
    design: str, rank: int, form: str | None, persistent: list[str]
) -> None:
    blocks = blocks_of(design, 16)
    for op in ("forward", "input_gradient"):
        matmul = blocks[op]
        assert isinstance(matmul, MatmulBlocks)
        blocks[op] = replace(matmul, resident=2, dependent=True, gradient_beside=True)
    with lookup.override_blocks(blocks):
        check(make_problem(70, 48, 104, rank, torch.float16, **in_form(form, rank, rank), seed=rank))
    assert persistent == [design] * 2


# Twelve tiles: of five programs, two have one tile more than the others, and wait for side tiles.
@pytest.mark.parametrize("programs", [5, *slow(1, 3)])
def test_any_number_of_programs_covers_all_tiles(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "multiprocessors_of", lambda device: programs)
    for design in PERSISTENT_DESIGNS:
        run_design(design, make_problem(70, 48, 104, 5, torch.float32))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Use the default blocks of an sm_90 without a table."""
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
def test_what_a_hopper_takes_by_default(rank: int, dropout_p: float, form: str | None, persistent: list[str]) -> None:
    options = in_form(form, rank, rank) | {"dropout_p": dropout_p, "seed": rank}
    check(make_problem(200, 64, 528, rank, torch.float16, **options))
    assert persistent == ["two_launch"] * 2


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("dropout_p", "measured"),
    [
        (0.3, True),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((0.0, True), (0.0, False), (0.3, False))),
    ],
)
def test_groups_take_pointer_loads_with_dropout_too(
    dropout_p: float, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = note_calls(monkeypatch, tile_matmul, "launch", lambda kernel, *rest, **named: (kernel, named))
    wide = MatmulBlocks("tile", 128, 256, 64, 16, 8, 8, 3)
    with lookup.override_blocks({"forward": wide, "input_gradient": wide} if measured else {}):
        check(draw_grouped((130, 0, 270), 272, 528, 5, torch.float16, dropout_p=dropout_p))
    products = [named for kernel, named in launches if kernel is tile_matmul.tile_matmul_kernel]
    tiles = [named["BLOCK_M"] * named["BLOCK_N"] for named in products]
    assert tiles == [128 * 256 if measured else 128 * 128] * 2


def test_partial_gradients_are_the_same_bits_every_time() -> None:
    problem = make_problem(130, 48, 80, 5, torch.float16)
    with lookup.override_blocks(blocks_of("two_launch", 16)):
        assert_equal(run(problem), run(problem))


@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_of_no_rows_are_zero(design: str) -> None:
    x, lora_A, lora_B = (torch.zeros(s, requires_grad=True) for s in ((0, 16), (4, 16), (32, 4)))
    with lookup.override_blocks(blocks_of(design, 16)):
        pk.plora_linear(x, torch.zeros(32, 16), lora_A, lora_B).sum().backward()
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


@pytest.mark.parametrize("design", DESIGNS)
def test_dropout_in_dx_takes_designs_whose_tiles_load_the_side_product(
    design: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for name in ("tile_matmul", "persistent_matmul"):
        taken.append(note_calls(monkeypatch, adapted_matmul, name, lambda *tensors, blocks, **options: blocks.design))
    run_design(design, make_problem(37, 48, 80, 5, torch.float32, dropout_p=0.4, seed=5))
    by_pointers, by_descriptors = taken
    persistent = design in PERSISTENT_DESIGNS
    assert (by_descriptors if persistent else by_pointers)[-1] == ("two_launch" if persistent else "tile_two_launch")


SETTINGS = {
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = False": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}
# Settings last as long as their process. So each is set in a child of one process, which imports torch only once.
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
