"""Memory of local training: measured while it runs, and estimated for ranks nobody has trained yet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fed.cost import tensor_bytes
from fed.errors import FedError
from fed.streams import torch_seed

if TYPE_CHECKING:
    from fed.config import RunConfig
    from fed.local import Workplace
    from fed.samples import Split
    from fed.training_config import TrainConfig

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


class Estimate(NamedTuple):
    """Bytes one client needs to train r modules a matrix: `fixed_bytes` + r · `module_bytes`."""

    fixed_bytes: int
    module_bytes: int

    def of(self, rank: int) -> int:
        """Return the bytes at rank r."""
        return self.fixed_bytes + rank * self.module_bytes

    def rank_within(self, budget_bytes: float) -> int:
        """Return the largest rank whose bytes do not exceed the budget; below 1 where not even one module fits."""
        return int((budget_bytes - self.fixed_bytes) // self.module_bytes)


def estimate(work: Workplace, config: RunConfig, split: Split) -> Estimate:
    """Return what training takes on this model, at this batch size and optimiser, by rank.

    Fixed: all weights; of the head its gradient and optimiser state; the activations of one batch of `split`'s first
    rows without the adapter's own. A module: Σ_matrices (K + N) · itemsize for its values, as much for its gradient
    and for each state of the optimiser (AdamW 2, SGD 1 with momentum), and what it keeps of one batch. Activations are
    measured at ranks 1 and R and grow linearly between. Where unselected modules are frozen all R are held besides.
    Temporary buffers and the allocator's own overhead are not in it.
    """
    train, adapter = config.train, config.adapter
    states = 2 if train.optimizer == "adamw" else int(train.momentum > 0)
    layers = work.handle.layers.values()
    width_bytes = sum((layer.in_features + layer.out_features) * layer.weight.element_size() for layer in layers)
    own = {id(factor) for layer in layers for factor in (layer.lora_A, layer.lora_B)}
    everything = (*work.model.parameters(), *work.model.buffers())
    weights = tensor_bytes(tensor for tensor in everything if id(tensor) not in own)
    head = tensor_bytes(work.head.values()) * (1 + states)
    held = work.rank * width_bytes if adapter.unselected == "frozen" and config.method == "fed-plora" else 0
    narrow, wide = (_activations(work, split, train.batch_size, rank) for rank in (1, work.rank))
    slope = (wide - narrow) // (work.rank - 1) if work.rank > 1 else 0
    return Estimate(weights + head + held + narrow - slope, width_bytes * (2 + states) + slope)


def ranks_within(budgets_mib: Sequence[float], need: Estimate, largest: int) -> list[int]:
    """Return the rank each budget affords, at most `largest`; FedError for a budget that affords none."""
    ranks = []
    for budget in budgets_mib:
        rank = need.rank_within(budget * MIB)
        if rank < 1:
            raise FedError(
                f"clients.memory_mib holds {budget:g}: training one module a matrix takes about "
                f"{need.of(1) / MIB:.1f} MiB on this model; it should be at least that"
            )
        ranks.append(min(rank, largest))
    return ranks


def _activations(work: Workplace, split: Split, batch_size: int, rank: int) -> int:
    """Return the bytes one batch's forward keeps for its backward with `rank` modules a matrix."""
    before = work.handle.factors()
    work.load({matrix: (A[:rank], B[:, :rank]) for matrix, (A, B) in before.items()}, dict(work.head))
    saved = SavedTensors(work.model)
    work.model.train()
    with saved.watching(True), torch_seed(work.device, 0, "estimate"):
        _ = work.model(**split.batch(torch.arange(min(batch_size, len(split))))).loss
        size_bytes = saved.size_bytes
    work.load(before, dict(work.head))
    return size_bytes
