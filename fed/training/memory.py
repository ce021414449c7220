"""Memory of local training: what a step keeps for its backward, what the optimiser holds, what the process took."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fed.config.training import TrainConfig

# Of glibc's mallopt: how much free memory stays at the heap's end, and from which size on a block is mapped apart.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30

MIB = 2**20
STATUS = Path("/proc/self/status")


class SavedTensors:
    """Counts the bytes a forward pass keeps for its backward: every storage once, the model's own left out."""

    def __init__(self, model: nn.Module, others: Iterable[Tensor] = ()) -> None:
        """Watch a model; `others` are left out besides."""
        own = (*model.parameters(), *model.buffers(), *others)
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._seen: dict[int, int] = {}

    @property
    def size_bytes(self) -> int:
        """The bytes counted so far."""
        return sum(self._seen.values())

    @contextmanager
    def watching(self, on: bool) -> Iterator[None]:
        """Count what is saved for backward inside; with `on` false do nothing."""
        if not on:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()


def restart_peak(device: torch.device) -> None:
    """Begin anew what `peak_bytes` looks back on; only CUDA can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use: on CUDA what torch allocated since `restart_peak`, else what the process ever had.

    The process's is the kernel's figure where /proc holds it: getrusage's begins with that of the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        peak = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimiser's state: AdamW's two moments, SGD's momentum, the step counts."""
    states = optimizer.state.values()
    return tensor_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))


def state_bytes(settings: TrainConfig, numbers: int, tensors: int, width: int) -> int:
    """Return what `optimizer_bytes` would be for so many trained numbers of `width` bytes, in so many tensors."""
    if settings.optimizer == "adamw":
        return 2 * numbers * width + 4 * tensors  # two moments, and a step count for each tensor
    return numbers * width if settings.momentum else 0


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors, up to a GiB; say whether its C library can be told.

    By default glibc hands the end of its heap back to the system as soon as some of it is free, and the next step has
    every page mapped and cleared anew: a quarter of a small model's step, measured. It holds until the process ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc, whose allocators need no telling
        return False
    return bool(mallopt(MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(TRIM_THRESHOLD, KEPT_BYTES))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return Σ numel · itemsize."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
