"""What a layer does inside torch's wrappers for several processes: DistributedDataParallel and fully_shard."""

from __future__ import annotations

import sys
import weakref

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plora_kernels.errors import StateError

# The ids of the parameters that each wrapper reduces or was told to leave alone. The wrapper holds the first and its
# model the others, so their ids stay theirs.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


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
    known = _KNOWN.get(wrapper)
    if known is None:
        reduced = getattr(wrapper, "_module_parameters", None)
        if reduced is None:
            return
        ignored = getattr(wrapper, "parameters_to_ignore", ())
        left_alone = (p for name, p in wrapper.module.named_parameters() if name in ignored)
        known = _KNOWN[wrapper] = frozenset(map(id, [*reduced, *left_alone]))
    if any(parameter.requires_grad and id(parameter) not in known for parameter in parameters):
        raise StateError(
            "DistributedDataParallel was made before the layer's present parameters, whose gradients it would not "
            "reduce: wrap the model again after select() with another number of modules, or after unfold()"
        )
