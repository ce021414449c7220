"""Count how a layer's calls ran: fused, or by PEFT's own forward and why."""

from __future__ import annotations

import torch
from torch import nn

FUSED = "fused"


def count(layer: nn.Module, reason: str | None) -> None:
    """Add one to the layer's calls that ran fused (None) or by PEFT for a reason; nothing is counted while compiling.

    >>> layer = nn.Identity()
    >>> count(layer, None), count(layer, "merged"), count(layer, "merged")
    (None, None, None)
    >>> layer._plora_calls
    {'fused': 1, 'merged': 2}
    """
    if torch.compiler.is_compiling():
        return
    calls = layer.__dict__.setdefault("_plora_calls", {})
    key = FUSED if reason is None else reason
    calls[key] = calls.get(key, 0) + 1
