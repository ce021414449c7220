"""What figures depend on besides the code: device, threads, versions, and the device's peak rates."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

import plora_kernels as pk
from bench.harness.timing import timer_for
from plora_kernels.tuning.lookup import capability_of
from plora_kernels.tuning.tables import PACKAGED, device_key, user_folder

COPY_BYTES = {"cuda": 2 * 2**30, "cpu": 64 * 2**20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 256}
REPEATS = 9
# Seconds reserved for writing and showing the last table.
RESERVE_SECONDS = 4.0

PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settle_compilers() -> None:
    """Set what is part of the keys of Triton's cache, so that every process finds the same kernels.

    Variables that are already set are not changed. Triton 3.9 has an option for fused multiply-add, which older
    versions always used. After `torch.compile` has made a kernel, Triton would use torch's ptxas, of another CUDA
    version, for the rest of the process, unless the environment names its own.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    found = importlib.util.find_spec("triton")
    for folder in found.submodule_search_locations or () if found is not None else ():
        ptxas = Path(folder) / "backends" / "nvidia" / "bin" / "ptxas"
        if ptxas.is_file():
            os.environ.setdefault("TRITON_PTXAS_PATH", str(ptxas))


def environment(device: torch.device, threads: int) -> dict[str, object]:
    """Describe the machine for a saved result by names and versions, without anything that identifies the host."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_name": _cpu_name(),
        "threads": threads,
        "cores": usable_cores(),
        "backend": pk.backend(device.type),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def device_slug(device: torch.device) -> str:
    """Return the name of a device's files, such as "nvidia-h200"; "cpu" for any CPU."""
    if device.type != "cuda":
        return device.type
    return device_key(torch.cuda.get_device_name(device))


def commit_of(folder: Path) -> str | None:
    """Return the commit checked out in a folder, "+" after it if files differ from it; None without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def source_digest() -> str:
    """Return a digest of the measured and the measuring code; tables of block sizes have their own."""
    digest = hashlib.sha256()
    for package in (Path(pk.__file__).parent, Path(__file__).parents[1]):
        _add(digest, package.parent, package.rglob("*.py"))
    return digest.hexdigest()[:16]


def tables_digest() -> str:
    """Return a digest of the tables of block sizes, the packaged ones and the user's; "none" if there are none."""
    digest = hashlib.sha256()
    tables = [_add(digest, folder, folder.glob("*.json")) for folder in (PACKAGED, user_folder())]
    return digest.hexdigest()[:16] if any(tables) else "none"


def _add(digest: "hashlib._Hash", folder: Path, paths: Iterable[Path]) -> int:
    """Add the names and contents of files to a digest; return the number of files."""
    files = sorted(paths)
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return len(files)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def ceilings(device: torch.device) -> dict[str, float]:
    """Return the medians of `copy_gbps` (read plus written) and `matmul_tflops_<dtype>` on random square matrices."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = {"copy_gbps": 2 * source.numel() / _median_s(partial(target.copy_, source), device) / 1e9}
    del source, target
    size = MATMUL_SIZE[device.type]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _median_s(partial(torch.matmul, left, right), device)
        found[f"matmul_tflops_{str(dtype).removeprefix('torch.')}"] = 2 * size**3 / seconds / 1e12
    return found


def _median_s(run: Callable[[], object], device: torch.device) -> float:
    timer = timer_for(device)
    for _ in range(REPEATS + 2):
        timer.call(run)
    return statistics.median(timer.read()[2:])


def timestamp() -> str:
    """Return the date and time in UTC, as results are dated."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def describe(device: torch.device, commit: str | None) -> dict[str, object]:
    """Return the meta record: the device, versions, the code, and how it was timed."""
    found = environment(device, threads=torch.get_num_threads())
    found["date"] = timestamp()
    found["commit"], found["source"] = commit or commit_of(Path.cwd()), source_digest()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"], found["l2_bytes"] = properties.total_memory, getattr(properties, "L2_cache_size", None)
        found["capability"] = capability_of(device)
    return found


def measure_kernels() -> None:
    """Choose the kernels by name, in this process and its workers: one that does not compile then raises an error
    instead of being replaced by plain torch.
    """
    os.environ.setdefault("PLORA_BACKEND", "triton")


def default_workers(device: torch.device) -> int:
    """Return how many processes check and compile ahead: several on a GPU, none on the CPU."""
    return max(1, min(10, usable_cores() - 2)) if device.type == "cuda" else 0
