"""Memory of local training: activations saved for the backward, optimiser state, and the peak of the process."""

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
    from fed.models.shared_model import SharedModel

# Parameters of glibc's mallopt: how much free memory stays at the end of the heap, and the size from which a block gets
# a memory mapping of its own.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30

MIB = 2**20
# What torch's allocators say in the RuntimeErrors that they raise, in lower case.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
STATUS = Path("/proc/self/status")


class SavedTensors:
    """Counter of the bytes that a forward saves for its backward: each storage once, the model's own excluded."""

    def __init__(self, model: nn.Module, others: Iterable[Tensor] = ()) -> None:
        """Exclude the model's parameters and buffers, and the storages of `others`."""
        own = (*model.parameters(), *model.buffers(), *others)
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._seen: dict[int, int] = {}

    @property
    def size_bytes(self) -> int:
        """The bytes counted so far."""
        return sum(self._seen.values())

    @contextmanager
    def watching(self, on: bool) -> Iterator[None]:
        """Within the context, count the tensors saved for backward; with `on` false do nothing."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device.

    On a GPU torch raises OutOfMemoryError, on a CPU a plain RuntimeError, and NumPy and Python raise MemoryError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in NO_MEMORY)


def restart_peak(device: torch.device) -> None:
    """Reset the peak that `peak_bytes` returns; on CPU this is not possible and does nothing."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory: on CUDA of torch's allocations since `restart_peak`, else of the process since its start.

    The peak of the process is read from /proc where it exists, because getrusage may report that of the parent process.
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
    """Return the `optimizer_bytes` of training `numbers` parameters of `width` bytes each, in `tensors` tensors."""
    if settings.optimizer == "adamw":
        return 2 * numbers * width + 4 * tensors  # two moments, and a step count for each tensor
    return numbers * width if settings.momentum else 0


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB of freed memory for reuse; return whether the C library supports it.

    By default glibc returns free memory at the end of its heap to the system, and the next training step must have
    every page mapped and cleared again, which took a quarter of a small model's step when measured. The setting lasts
    until the process ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # the C library is not glibc and has no mallopt
        return False
    return bool(mallopt(MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(TRIM_THRESHOLD, KEPT_BYTES))


def base_bytes(shared: SharedModel) -> int:
    """Return the bytes of the model's parameters and buffers, head included, without the adapter's A and B."""
    own = {id(factor) for layer in shared.handle.layers.values() for factor in (layer.lora_A, layer.lora_B)}
    everything = (*shared.model.parameters(), *shared.model.buffers())
    return tensor_bytes(tensor for tensor in everything if id(tensor) not in own)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors: Σ numel · itemsize."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
