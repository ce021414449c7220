"""Every kernel compiles for GPUs that are not here: no spill, shared memory that fits, warpgroup MMA on Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def audit(folder: Path, *dtypes: str) -> list[dict]:
    """Return what `python -m bench.audit` finds, run in a process without the interpreter."""
    path = folder / "audit.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.audit", "--json", str(path), "--dtypes", *dtypes]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return audit(tmp_path_factory.mktemp("audit"), "bfloat16")


KERNELS = {"adapted_matmul_kernel", "partial_gradient_kernel", "reduce_gradient_kernel", "fold_kernel"}


def assert_fits(rows: list[dict]) -> None:
    assert {(row["kernel"], row["target"]) for row in rows} == {(k, t) for k in KERNELS for t in ("sm_80", "sm_90")}
    assert [row for row in rows if row["spill_bytes"] > 0] == []
    assert [row for row in rows if row["shared_bytes"] > row["shared_limit_bytes"]] == []


def test_no_kernel_spills_and_shared_memory_fits(rows: list[dict]) -> None:
    assert_fits(rows)


@pytest.mark.slow
def test_other_dtypes_fit_too(tmp_path: Path) -> None:
    assert_fits(audit(tmp_path, "float16", "float32"))


def test_products_run_on_the_matrix_units(rows: list[dict]) -> None:
    products = [row for row in rows if row["kernel"] != "reduce_gradient_kernel"]
    assert [row for row in products if not row["mma"]] == []


def test_hopper_code_uses_warpgroup_mma(rows: list[dict]) -> None:
    # One row of x fills no warpgroup, and lines that start anywhere get tiles too small for one.
    odd = (" M1 ", " K50 ", " K1000 ", " K1001 ")
    wide = [row for row in rows if row["target"] == "sm_90" and not any(mark in row["case"] for mark in odd)]
    for kernel in ("adapted_matmul_kernel", "partial_gradient_kernel", "fold_kernel"):
        chosen = [row for row in wide if row["kernel"] == kernel]
        assert chosen
        assert all(row["warpgroup_mma"] for row in chosen), kernel
