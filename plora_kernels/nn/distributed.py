"""What a layer does inside torch's wrappers for several processes: DistributedDataParallel and fully_shard."""

from __future__ import annotations

import sys
import weakref

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plora_kernels.errors import StateError

# The ids of the parameters that each wrapper reduces. The wrapper holds the parameters, so their ids stay theirs.
_REDUCED: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, as `fully_shard` and tensor parallelism make of parameters."""
    module = sys.modules.get("torch.distributed.tensor")  # loaded if any DTensor exists
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """Return a DTensor's whole tensor, which all its processes must ask for together; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def refuse_unreduced(*parameters: nn.Parameter) -> None:
    """Raise StateError if a DistributedDataParallel that runs at the moment was made before these parameters.

    It would not reduce their gradients, and the processes would train apart without a word.
    """
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None:
        return
    reduced = _REDUCED.get(wrapper)
    if reduced is None:
        known = getattr(wrapper, "_module_parameters", None)
        if known is None:
            return
        reduced = _REDUCED[wrapper] = frozenset(map(id, known))
    if any(parameter.requires_grad and id(parameter) not in reduced for parameter in parameters):
        raise StateError(
            "DistributedDataParallel was made before the layer's present parameters, whose gradients it would not "
            "reduce: wrap the model again after select() with another number of modules, or after unfold()"
        )
