"""What the device can do at most, measured: copying memory and multiplying matrices."""

import statistics
from collections.abc import Callable
from functools import partial

import torch

from bench.timing import timer_for

COPY_BYTES = {"cuda": 2 * 2**30, "cpu": 64 * 2**20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 256}
REPEATS = 9


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
