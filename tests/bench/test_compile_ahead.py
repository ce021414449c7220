"""A Triton cache filled without a GPU serves a run on a GPU, from other folders of the code and of the cache too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench import compile_ahead
from bench.audit.offline import TARGETS, compiling_for
from bench.checks.inputs import DTYPES, FORMS, CheckShape
from bench.compile_ahead import Piece, name_of, pieces
from bench.gpu_cases import device_cases
from bench.harness.machine import settle_compilers
from bench.measure import Warmup
from bench.sitting import FIRST_CASES
from bench.tune.tuner import Attempt
from plora_kernels.tuning.blocks import ShapeClass

ROOT = Path(__file__).resolve().parent.parent.parent

# Runs pieces of work on tensors of the given device and prints the hashes of the kernels they launch. On "cpu" the
# tensors have storage and real addresses, as on a GPU, and operators run as in a real call. It fails if a kernel has to
# be compiled there, or differs from the one compiled without storage.
LAUNCHED = """
import json, os, sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock
from bench import compile_ahead
from bench.cases import Case, Projection
from bench.checks.operators import CheckShape, run_each_form
from bench.measure import Warmup, warm_up
from bench.audit.offline import TARGETS, compiling_for
from plora_kernels.tuning.blocks import ShapeClass
from plora_kernels.tuning.lookup import record_blocks
from triton.backends.nvidia.compiler import CUDABackend

cache, device, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
compile_ahead.settle_cache(cache)
compiled = []

def refuse(*arguments, **named):
    compiled.append(arguments)
    raise RuntimeError("not in the cache")

seen = mock.patch.object(CUDABackend, "add_stages", refuse) if device == "cpu" else nullcontext()
# While blocks are recorded no call is replayed: a replay would launch, which nothing can here.
with compiling_for(TARGETS["sm_90"]) as launches, record_blocks(), seen:
    if kind == "case":
        for op, projection in (("forward_backward", Projection("a", "b", 256, 384)),):
            causes = warm_up(Warmup(Case(op, projection, 512, 16, "bfloat16"), device, compile_ahead.OURS))
            assert not causes, causes
    else:
        sizes = [(256, 512, 384, 16), (37, 50, 29, 5), (1, 1024, 1024, 16), (300, 1000, 520, 128)]
        for shape in [CheckShape(device, kind, *size) for size in sizes]:
            with mock.patch.object(CheckShape, "forms", lambda shape: FORMS if shape.m > 1 else FORMS[:9]):
                list(run_each_form(shape))  # results are those of kernels that never ran
assert not compiled
print(json.dumps(sorted({launch.compiled.hash for launch in launches})))
""".replace("FORMS", repr(FORMS))


def launched(root: Path, cache: Path, device: str, kind: str) -> list[str]:
    """Return the hashes of kernels that a process with the code in `root` finds in the cache or adds to it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    command = [sys.executable, "-c", LAUNCHED, str(cache), device, kind]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def copy_of_the_code(folder: Path) -> Path:
    for package in ("plora_kernels", "bench", "fed"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return folder


def assert_found_elsewhere(folder: Path, kind: str) -> None:
    """Fill a cache, copy it to another folder, and check that another copy of the code finds all kernels in it."""
    here, there = folder / "here", folder / "there"
    ahead = launched(ROOT, here, "meta", kind)
    compile_ahead.pack(here, folder / "cache.tar.gz")
    shutil.rmtree(here)
    compile_ahead.unpack(folder / "cache.tar.gz", there)
    assert launched(copy_of_the_code(folder / "code"), there, "cpu", kind) == ahead
    assert ahead


@pytest.mark.slow
def test_what_is_compiled_ahead_is_found_by_other_processes_of_code_elsewhere(tmp_path: Path) -> None:
    assert_found_elsewhere(tmp_path, "case")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed-bfloat16", "float32"])
def test_what_checks_launch_is_found_too(tmp_path: Path, dtype: str) -> None:
    assert_found_elsewhere(tmp_path, dtype)


@pytest.mark.slow
def test_the_command_says_what_it_compiled_and_for_what(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile_ahead", str(tmp_path / "cache")]
    command += ["--cases", "2", "--classes", "1", "--candidates", "2", "--spills", "--workers", "2"]
    command += ["--pack", str(tmp_path / "cache.tar.gz")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "[4/4]" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert "kernels for Triton" in last
    assert "sm_90, 132 multiprocessors" in last
    assert "0 failures" in last
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == int(last.split(": ")[-1].split()[0])
    compile_ahead.unpack(tmp_path / "cache.tar.gz", tmp_path / "unpacked")
    assert len(list((tmp_path / "unpacked").rglob("*.cubin"))) == len(list((tmp_path / "cache").rglob("*.cubin")))


def test_what_does_not_compile_is_named_with_its_kernel_and_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(shape: ShapeClass, device: torch.device) -> None:
        error = RuntimeError("out of resource: shared memory")
        error.add_note("fold_kernel")
        raise error

    monkeypatch.setattr(compile_ahead, "compiling_for", lambda target: nullcontext([]))
    monkeypatch.setattr(compile_ahead, "make_trial", fail)
    compile_ahead._trial.cache_clear()
    options = compile_ahead.parse(["cache", "--classes", "1", "--candidates", "1", "--workers", "0"])
    work = pieces(options, TARGETS["sm_90"])
    assert len(work) == 1
    found = compile_ahead.compile_all(work, TARGETS["sm_90"], options)
    assert found.failed == [f"{name_of(work[0])}: RuntimeError: out of resource: shared memory; fold_kernel"]
    assert "side_product" in name_of(work[0])
    assert f"    FAILED {found.failed[0]}\n" in capsys.readouterr().out
    monkeypatch.setattr(compile_ahead, "compile_all", lambda *given: found)
    assert compile_ahead.fill(options) == 1


def test_pieces_are_what_is_asked_for() -> None:
    def asked(*options: str) -> list[Piece]:
        return pieces(compile_ahead.parse(["cache", *options]), TARGETS["sm_90"])

    assert asked() == []
    checks = asked("--check-dtypes", "tf32")
    assert {(piece.device, piece.dtype) for piece in checks} == {("meta", "tf32")}
    assert len(asked("--cases", "3")) == 3
    tried = asked("--classes", "2", "--candidates", "5")
    assert [piece.shape.op for piece in tried] == ["side_product"] * 5 + ["output_gradient"] * 5
    classes = {piece.shape for piece in asked("--classes", "1", "--candidates", "5", "--defaults")}
    assert len(asked("--defaults")) == len(classes) > 30
    assert all(isinstance(piece, Attempt) for piece in tried)


def test_a_sitting_s_pieces_are_those_of_its_steps() -> None:
    def of(sitting: str) -> list[Piece]:
        return pieces(compile_ahead.parse(["cache", "--sitting", sitting]), TARGETS["sm_90"])

    first, second = of("first"), of("second")
    gate = {(4096, 4096, 16)}
    tried = [work.shape for work in first if isinstance(work, Attempt)]
    assert {shape.op for shape in tried} >= {"forward", "input_gradient", "output_gradient", "factor_gradient"}
    assert {(shape.d_in, shape.d_out, shape.r) for shape in tried if shape.op == "forward"} == gate
    assert {work.dtype for work in first if isinstance(work, CheckShape)} == {"bfloat16", "mixed-bfloat16"}
    assert sum(isinstance(work, Warmup) for work in first) == FIRST_CASES
    assert {work.dtype for work in second if isinstance(work, CheckShape)} == set(DTYPES)
    assert sum(isinstance(work, Warmup) for work in second) == len(device_cases("cuda"))


def test_forms_without_storage_are_those_of_a_gpu_but_for_graphs() -> None:
    pytest.importorskip("triton")
    with compiling_for(TARGETS["sm_90"]):
        forms = CheckShape("meta", "bfloat16", 256, 512, 384, 16).forms()
    assert forms[: len(FORMS)] == FORMS
    assert {"no synchronisation", "design persistent", "design algebra"} <= set(forms)
    assert "graph replay" not in forms


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_ahead.main(["cache", "--cases", "1"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_file_that_is_no_cache_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no tar")
    assert compile_ahead.main([str(tmp_path / "cache"), "--unpack", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_compilers_are_settled_once_and_what_is_said_already_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for name in ("TRITON_DEFAULT_FP_FUSION", "TRITON_PTXAS_PATH"):
        monkeypatch.setenv(name, "")  # restored by monkeypatch
        monkeypatch.delenv(name)
    settle_compilers()
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"
    assert Path(os.environ["TRITON_PTXAS_PATH"]).is_file()
    assert Path(os.environ["TRITON_PTXAS_PATH"]).parts[-5:] == ("triton", "backends", "nvidia", "bin", "ptxas")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "another")
    settle_compilers()
    assert os.environ["TRITON_PTXAS_PATH"] == "another"
