"""What a figure depends on beside the code: device, threads and versions."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import plora_kernels as pk

PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(device: torch.device, threads: int) -> dict[str, object]:
    """Describe the machine for a saved result: names and versions, nothing that identifies the host."""
    return {
        "device": device.type,
        "device_name": _device_name(device),
        "cpu_name": _cpu_name(),
        "threads": threads,
        "cores": usable_cores(),
        "backend": pk.backend(device.type),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
