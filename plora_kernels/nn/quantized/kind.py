"""What a kind of quantised linear offers to an adapter: its values, and its library's own product."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn


class QuantizedKind(abc.ABC):
    """What the layers of one kind have in common; a kind has no state."""

    name: str

    @abc.abstractmethod
    def problem(self, module: nn.Linear) -> str | None:
        """Return why this module cannot have an adapter, as the end of a sentence about it; None if it can."""

    @abc.abstractmethod
    def dequantize(self, module: nn.Linear, dtype: torch.dtype) -> Tensor:
        """Return the weight's values (N, K) in a floating dtype, in new memory."""

    def product(self, module: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return x Wᵀ + bias (…, N) in x's dtype by the library's own kernel, in new memory.

        None if the library has none that serves a few rows better than `dequantize`, or that is as exact. It is called
        without a graph and without autocast.
        """
        return None

    def survives_casts(self, module: nn.Linear) -> bool:
        """Say whether a cast of the module's floating tensors leaves the weight's values as they are, to rounding."""
        return True

    def dtypes(self, module: nn.Linear, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtype that products run in and that of y; `autocast` is the active one's dtype."""
        return (x.dtype if autocast is None else autocast), x.dtype
