"""Parameters that a layer took out of use: an optimiser that still holds one raises instead of training nothing."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from plora_kernels.errors import StateError

_MARK = "_plora_replaced_by"


def mark_replaced(parameter: nn.Parameter, action: str) -> None:
    """Make every optimiser that holds the parameter raise StateError at its next step; `action` replaced it.

    Its gradient is dropped, because it belongs to what the parameter was. From the first call on all optimisers of the
    process look for such parameters, which takes less than a microsecond for each parameter and step.
    """
    parameter.grad = None
    setattr(parameter, _MARK, action)
    _watch_optimizers()


def mark_in_use(parameter: nn.Parameter) -> None:
    """Take back `mark_replaced`: the layer uses the parameter again."""
    if hasattr(parameter, _MARK):
        delattr(parameter, _MARK)


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_refuse_replaced)


def _refuse_replaced(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            action = getattr(parameter, _MARK, None)
            if action is not None:
                raise StateError(
                    f"the optimiser holds a parameter {tuple(parameter.shape)} that {action} replaced, so it would "
                    f"train nothing: build it from the parameters the model has now"
                )
