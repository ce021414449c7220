"""How often a fused layer was called, and why PEFT's forward computed a call."""

from __future__ import annotations

import torch
from torch import nn

FUSED = "fused"
_COUNTS = "_plora_calls"  # the layer's attribute; no parameter and no buffer, so it is in no state dict


def count(layer: nn.Module, reason: str | None) -> None:
    """Count a call: of the fused forward if `reason` is None, else of PEFT's forward, for this reason.

    Calls inside torch.compile are not counted: a number that changes would make it compile anew at every call.
    """
    if not torch.compiler.is_compiling():
        calls = vars(layer).setdefault(_COUNTS, {})
        key = FUSED if reason is None else reason
        calls[key] = calls.get(key, 0) + 1


def calls_of(layer: nn.Module) -> dict[str, int]:
    """Return how many calls of a layer were fused (key "fused") and how many PEFT's forward computed, by reason."""
    return dict(vars(layer).get(_COUNTS, {}))


def forget_calls(layer: nn.Module) -> None:
    """Drop a layer's counts."""
    vars(layer).pop(_COUNTS, None)
