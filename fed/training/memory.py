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

from fed.training.elementwise import observing
from fed.training.token_losses import slice_bytes

if TYPE_CHECKING:
    import plora_kernels as pk
    from fed.config.training import TrainConfig
    from fed.data.tables import Table
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
    """Counter of the bytes that a forward saves for its backward: each storage once, the model's own excluded.

    Of several forwards, each with its backward after it, the one that saves most counts.
    """

    def __init__(self, model: nn.Module, others: Iterable[Tensor] = ()) -> None:
        """Exclude the model's parameters and buffers, and the storages of `others`."""
        own = (*model.parameters(), *model.buffers(), *others)
        self._own = {_storage_of(tensor) for tensor in own}
        self._seen: dict[int, int] = {}
        self._most = 0

    @property
    def size_bytes(self) -> int:
        """The bytes counted so far."""
        return max(self._most, sum(self._seen.values()))

    @contextmanager
    def watching(self, on: bool) -> Iterator[None]:
        """Within the context, count the tensors saved for backward; with `on` false do nothing."""
        if not on:
            yield
            return
        self._most, self._seen = self.size_bytes, {}
        with observing(self._count):
            yield

    def _count(self, tensor: Tensor) -> None:
        key = _storage_of(tensor)
        if key not in self._own:
            self._seen[key] = tensor.untyped_storage().nbytes()


def _storage_of(tensor: Tensor) -> int:
    """Return what tells a storage from others while it exists; its address would be 0 on the meta device."""
    return int(tensor.untyped_storage()._cdata)


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
    return tensor_bytes(part for tensor in everything if id(tensor) not in own for part in parts_of(tensor))


def buffer_bytes(shared: SharedModel, table: Table, samples: int) -> int:
    """Return the bytes of a step's largest tensors beside those that its forward saves for the backward.

    They are a slice of the logits of `samples` rows, with its logarithms, or the largest weight that is dequantised.
    """
    numbers = (layer.in_features * layer.out_features for layer in shared.handle.layers.values() if _is_packed(layer))
    itemsize = getattr(shared.model, "dtype", torch.float32).itemsize
    return max(slice_bytes(shared.model, table, samples), max(numbers, default=0) * itemsize)


def _is_packed(layer: pk.FusedPLoRALinear) -> bool:
    """Return whether a layer's weight is quantised: it then consists of other tensors, or has scales beside it."""
    return any(part is not layer.weight for part in parts_of(layer.weight))


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a parameter consists of: itself, or of a quantised one its values and their scales.

    torchao's weights are tensors made of others; bitsandbytes' have scales in their `quant_state`, `SCB` or `CB`.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]
    found = {_storage_of(tensor): tensor}
    states = [vars(tensor)] if hasattr(tensor, "__dict__") else []
    while states:
        for name, value in states.pop().items():
            if name in ("quant_state", "state2") and value is not None:
                states.append(vars(value))
            elif isinstance(value, Tensor) and name in ("absmax", "code", "offset", "SCB", "CB"):
                found.setdefault(_storage_of(value), value)
    return [*found.values()]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors: Σ numel · itemsize."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
