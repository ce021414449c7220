"""Compiling every kernel for GPUs that are not here: no spills, shared memory that fits, matrix units in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.audit import jobs as audit_module
from bench.audit.jobs import MIXED_SHAPES, SHAPES, Job, design_jobs, shape_jobs, table_jobs
from bench.audit.machine_code import LIMITS, Usage, is_trap, resident_blocks
from bench.audit.offline import TARGETS, Launch
from bench.checks.designs import Shape, design_blocks, design_ways
from plora_kernels.tuning.blocks import (
    DESIGNS,
    KERNEL_DESIGNS,
    PERSISTENT_DESIGNS,
    FoldBlocks,
    MatmulBlocks,
    ShapeClass,
)
from plora_kernels.tuning.tables import PACKAGED, Entry, save_table

ROOT = Path(__file__).resolve().parents[3]
MATRIX_UNITS = {"sm_80": {"mma"}, "sm_90": {"wgmma", "mma"}, "sm_100": {"tcgen05", "mma"}, "gfx942": {"mfma"}}
# Kernels without a matrix product.
WITHOUT_PRODUCTS = {"reduce_gradient_kernel", "grouped_tiles_kernel"}


def audit(folder: Path, *options: str) -> list[dict]:
    """Return what `python -m bench.audit` finds, run in a process without the interpreter."""
    path = folder / "audit.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.audit", "--json", str(path), *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(path.read_text())


def assert_fits(rows: list[dict], targets: Iterable[str] = TARGETS) -> None:
    for target in targets:
        kernels = {row["kernel"] for row in rows if row["target"] == target}
        assert kernels >= {"fold_kernel", "fold_many_kernel", "partial_gradient_kernel", "reduce_gradient_kernel"}, (
            target
        )
        # On a Hopper many aligned rows of half precision, all that the usual shape has, are not joined.
        few_or_wide = any(" M1 " in row["case"] or "float32" in row["case"] for row in rows)
        if few_or_wide or not TARGETS[target].hardware.is_hopper:
            assert kernels >= {"projections_forward_kernel", "projections_input_gradient_kernel"}, target
        assert kernels >= {"tile_matmul_kernel", "grouped_tiles_kernel", "side_product_kernel"}, target
        assert any("matmul" in kernel for kernel in kernels), target
    assert [row for row in rows if row["error"]] == []
    used = [row for row in rows if not row["candidate"]]
    assert [row for row in used if row["spill_bytes"] > 0] == []
    assert [row for row in used if row["shared_bytes"] > row["shared_limit_bytes"]] == []
    assert [row for row in used if row["blocks_resident"] < 1] == []
    products = [row for row in rows if row["kernel"] not in WITHOUT_PRODUCTS and "float32" not in row["case"]]
    assert [row for row in products if not MATRIX_UNITS[row["target"]] & set(row["instructions"])] == []


def assert_warpgroup_mma(rows: list[dict]) -> None:
    # One row of x does not fill a warp group, and unaligned rows get tiles too small for one.
    odd = (" M1 ", " M37 ", " K1000 ", " K1001 ")
    wide = [row for row in rows if row["target"] == "sm_90" and not any(mark in row["case"] for mark in odd)]
    chosen = [row for row in wide if row["kernel"] not in WITHOUT_PRODUCTS]
    # Entries of a packaged table are measured: they may have tiles too small for a warp group.
    tuned = tuple(table.stem for table in PACKAGED.glob("*.json"))
    chosen = [row for row in chosen if not row["case"].endswith(tuned)]
    # The side product of few rows is cut into tiles of 16 rows, so that more programs read x.
    chosen = [row for row in chosen if row["kernel"] != "side_product_kernel" or " M512 " not in row["case"]]
    assert chosen
    assert [row for row in chosen if "wgmma" not in row["instructions"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("sm_90", "gfx942"), ("sm_80", "sm_100")], ids="-".join)
def test_the_usual_shape_fits(tmp_path: Path, targets: tuple[str, ...]) -> None:
    rows = audit(tmp_path, "--shapes", "1", "--no-designs", "--targets", *targets)
    assert_fits(rows, targets)
    if "sm_90" in targets:
        assert_warpgroup_mma(rows)


@pytest.mark.slow
def test_every_shape_fits_every_target(tmp_path: Path) -> None:
    rows = audit(tmp_path)
    assert_fits(rows)
    assert_warpgroup_mma(rows)
    persistent = [row for row in rows if row["kernel"] == "persistent_matmul_kernel" and row["target"] == "sm_90"]
    assert persistent
    assert [row for row in persistent if row["spill_bytes"] > 0 or row["blocks_resident"] < 1] == []


@pytest.mark.slow
def test_other_dtypes_fit_too(tmp_path: Path) -> None:
    assert_fits(audit(tmp_path, "--dtypes", "float16", "float32", "--shapes", "3", "--no-designs"))


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.audit"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: TRITON_INTERPRET is set, so nothing would be compiled; unset it\n"


@pytest.mark.parametrize(
    ("target", "usage", "warps", "blocks"),
    [
        ("sm_90", Usage(32, 0, 0), 4, 16),  # 64 warps, 4 a block
        ("sm_90", Usage(16, 0, 0), 1, 32),  # no more than 32 blocks
        ("sm_90", Usage(255, 0, 0), 8, 1),  # 512 // 256 = 2 warps a partition, 8 in all
        ("sm_90", Usage(168, 0, 0), 4, 3),  # 512 // 168 = 3 warps a partition, 12 in all
        ("sm_90", Usage(32, 0, 100 * 1024), 4, 2),  # 228 KiB hold two of 101
        ("sm_80", Usage(32, 0, 100 * 1024), 4, 1),  # 164 KiB hold one
        ("gfx942", Usage(128, 0, 0), 4, 4),  # 512 // 128 = 4 waves a SIMD, 16 in all
        ("gfx942", Usage(64, 0, 40 * 1024), 4, 1),  # 64 KiB hold one of 40
        ("gfx942", Usage(64, 0, 70 * 1024), 4, 0),  # it does not run
    ],
)
def test_occupancy_by_hand(target: str, usage: Usage, warps: int, blocks: int) -> None:
    assert resident_blocks(usage, warps, LIMITS[target]) == blocks


def test_a_kernel_that_is_a_trap_is_an_error() -> None:
    def compiled(body: str) -> SimpleNamespace:
        return SimpleNamespace(hash="0123456789abcdef", asm={"ptx": f".visible .entry kernel()\n{{\n\t{body}\n}}"})

    job = Job(Shape(8192, 4096, 4096, 16), "bfloat16", TARGETS["sm_100"])
    row = audit_module.row_of(Launch("a_kernel", compiled("trap;"), 4), job)
    assert row.error == "compiles to a trap"
    assert not is_trap(compiled("ret;"))
    assert not is_trap(SimpleNamespace(asm={"amdgcn": "s_trap 2"}))


def test_every_design_has_candidates_on_hopper_and_blackwell() -> None:
    shape = Shape(8192, 4096, 4096, 16)
    for target in ("sm_90", "sm_100"):
        for design in DESIGNS:
            blocks = design_blocks(design, shape, "bfloat16", TARGETS[target].hardware)
            assert set(blocks) == {"forward", "input_gradient"}
            assert all(isinstance(found, MatmulBlocks) and found.design == design for found in blocks.values())
    assert design_blocks("one_launch", shape, "bfloat16", TARGETS["sm_80"].hardware) == {}


@pytest.mark.parametrize(("dtype", "tile"), [("float32", (64, 64)), ("tf32", (64, 128)), ("float16", (128, 256))])
def test_designs_are_compiled_with_tiles_that_their_dtype_can_hold(dtype: str, tile: tuple[int, int]) -> None:
    for design in KERNEL_DESIGNS:
        blocks = design_blocks(design, Shape(8192, 4096, 4096, 16), dtype, TARGETS["sm_90"].hardware)
        assert [(found.block_m, found.block_n) for found in blocks.values()] == [tile, tile]


def test_every_way_to_overlap_is_audited() -> None:
    ways = [
        way
        for design in PERSISTENT_DESIGNS
        for way in design_ways(design, Shape(8192, 4096, 4096, 16), "bfloat16", TARGETS["sm_90"].hardware)
    ]
    assert ways == [
        *("persistent", "two_launch", "two_launch dependent", "one_launch", "drawn"),
    ]


def test_the_entries_of_the_tables_are_compiled_for_their_device(tmp_path: Path) -> None:
    fold = FoldBlocks(16, 64, 16, 4, 2)
    matmul = MatmulBlocks("tile", 64, 64, 32, 16, 8, 4, 3)
    entries = [
        Entry(ShapeClass("fold", "bfloat16", 512, 256, 512, 8), fold, 1.0),
        Entry(ShapeClass("fold", "bfloat16", 512, 256, 512, 8), fold, 2.0),
        Entry(ShapeClass("input_gradient", "float16", 37, 512, 256, 16), matmul, 1.0),
    ]
    save_table(tmp_path / "a-gpu.json", entries, {"capability": 90})
    save_table(tmp_path / "b-gpu.json", entries, {"capability": 75})
    of_fold = Job(Shape(128, 256, 512, 8), "bfloat16", TARGETS["sm_90"], "a-gpu", (("fold", fold),))
    of_matmul = Job(Shape(37, 256, 512, 16), "float16", TARGETS["sm_90"], "a-gpu", (("input_gradient", matmul),))
    found = list(table_jobs(list(TARGETS.values()), tmp_path))
    # With factors in float32 the same blocks are compiled once.
    mixed = [replace(job, mixed=True) for job in (of_fold, of_matmul)]
    assert found == [of_fold, mixed[0], of_fold, of_matmul, mixed[1]]
    alike = list(table_jobs(list(TARGETS.values()), tmp_path, mixed=False))
    assert alike == [of_fold, of_fold, of_matmul]
    assert [job.case for job in found[1:3]] == [
        "bfloat16 mixed M128 K256 N512 R8 a-gpu",
        "bfloat16 M128 K256 N512 R8 a-gpu",
    ]


def test_what_is_compiled_with_wide_factors() -> None:
    target = [TARGETS["sm_90"]]
    shapes = [job for job in shape_jobs(SHAPES, ("bfloat16", "float32"), target) if job.mixed]
    assert [job.shape for job in shapes] == [shape for shape in SHAPES if shape in MIXED_SHAPES]
    assert len(shapes) == len(MIXED_SHAPES)
    assert {job.dtype for job in shapes} == {"bfloat16"}
    designs = [job.name for job in design_jobs(("bfloat16", "float32"), target) if job.mixed]
    assert designs == list(KERNEL_DESIGNS)
