"""The torch path under settings that make one machine compute as other processors do."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# The settings of torch, oneDNN and MKL; MKL's second variable works on Intel processors only.
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
SETTINGS = {
    "DEFAULT": ("default", "SSE41", "COMPATIBLE"),
    "AVX2": ("avx2", "AVX2", "AVX2", "AVX2"),
    "AVX512": ("avx512", "AVX512_CORE", "AVX512", "AVX512"),
}
LEVELS = tuple(SETTINGS)  # torch's own kernels; a level that the processor lacks would crash
PLACES = (
    *("test_bound.py", "test_reference.py", "test_folding.py", "ops", "fallback"),
    *("nn/test_linear.py", "nn/test_row_groups.py"),
)
# Prints what a process under a setting uses.
PROBE = """
import hashlib, torch
generator = torch.Generator().manual_seed(0)
a, b = (torch.randn(s, generator=generator, dtype=torch.float64).float() for s in ((130, 257), (257, 100)))
print(torch.backends.cpu.get_cpu_capability(), hashlib.sha256((a @ b).numpy().tobytes()).hexdigest())
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkl.is_available(),
        reason="the settings are those of x86 and MKL",
    ),
]


def run_under(level: str, *arguments: str) -> str:
    """Return what Python prints under a setting, with one thread; skip if torch has no kernels of that level here."""
    if LEVELS.index(level) > LEVELS.index(torch.backends.cpu.get_cpu_capability()):
        pytest.skip(f"no {level} here")
    environment = os.environ | dict(zip(VARIABLES, SETTINGS[level], strict=False)) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{level}: {done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_settings_take_effect() -> None:
    """torch uses kernels of the given level; MKL's oldest kernels, without fused multiply-add, give other bits."""
    there = LEVELS[: LEVELS.index(torch.backends.cpu.get_cpu_capability()) + 1]
    found = {level: run_under(level, "-c", PROBE).split() for level in there}
    assert [found[level][0] for level in there] == list(there)
    products = {level: found[level][1] for level in there}
    assert all(products[level] != products["DEFAULT"] for level in there[1:])


@pytest.mark.parametrize("level", LEVELS)
def test_the_torch_path_is_within_the_bound_on(level: str) -> None:
    """The processor decides in which order products are summed, and with it the bits and errors of results.

    A tolerance found on one machine may therefore fail on another, and so may equal bits of two layouts of a product.
    MKL, oneDNN and torch can be told to use the instructions of other processors.
    """
    places = [f"tests/plora_kernels/{name}" for name in PLACES]
    # Left out: Triton's interpreter, whose NumPy does not depend on these settings, and torch.compile, which reuses
    # cached code of another level and then gives NaN, as it would not on a processor of that level.
    chosen = "not triton and not test_kernels and not the_kernels and not compile"
    run_under(level, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *places)
