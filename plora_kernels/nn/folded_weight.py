"""A layer's weight into which modules are folded, and from which the original is restored bit for bit."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from plora_kernels.errors import ConfigError

ORIGINALS = ("device", "host")


def check_original(original: str) -> None:
    """Raise ConfigError unless `original` is "device" or "host", where a folded weight's original can be kept."""
    if original not in ORIGINALS:
        raise ConfigError(f"original is {original!r}; it may be 'device' or 'host'")


class FoldedWeight(nn.Module):
    """A layer whose `weight` (N, K) can be replaced by a folded one and restored to the original.

    The original is kept on the weight's device (`original_weight`, a frozen parameter that is never saved) or in host
    memory. On the device the original keeps its memory, and the parameter, still the same object, uses new memory while
    folded. The weight's version counter shows whether other code changed it in between.
    """

    weight: nn.Parameter
    original_weight: nn.Parameter | None

    def _keep_originals(self, original: str) -> None:
        """Set where originals are kept, "device" or "host"; the weight is not folded yet."""
        self.original = original
        self.register_parameter("original_weight", None)
        self._host_original: Tensor | None = None
        self._folded_version: int | None = None

    def _keep_original(self) -> tuple[Tensor, Tensor | None]:
        """Keep the original; return the weight to fold, and memory for the result (None: fold in place).

        With "device" the original keeps its memory: the fold writes to new memory, which `_take_folded` gives to the
        parameter, so that W is read once and written once, without a copy.
        """
        weight = self.weight.detach()
        if self.original == "host":
            self._host_original = weight.to("cpu", copy=True)
            return self.weight, None
        return weight, torch.empty_like(weight)

    def _take_folded(self, folded: Tensor) -> None:
        """Make `folded` the weight's values: the weight itself after a fold in place, or the new memory."""
        if folded is not self.weight:
            self.original_weight = nn.Parameter(self.weight.data, requires_grad=False)
            self._give_memory(folded)
        self._folded_version = self.weight._version

    def _folded_anew(self, weight: Tensor) -> Tensor | None:
        """Return the original `weight`, folded again with the current selection; None without a selection."""
        raise NotImplementedError

    def _give_memory(self, values: Tensor) -> None:
        """Make the weight, still the same parameter, use the memory of `values`, and raise its version counter."""
        self.weight.data = values
        torch.autograd.graph.increment_version(self.weight)

    def _drop_original(self) -> None:
        """Restore the weight from its original, if one is kept, and release the original."""
        original = self._original()
        if original is not None:
            weight = self.weight
            alike = (original.dtype, original.device, original.shape) == (weight.dtype, weight.device, weight.shape)
            if alike and self.original == "device":
                self._give_memory(original.detach())
            else:
                weight.copy_(original)
        self.original_weight = self._host_original = self._folded_version = None

    def _weight_is_as_folded(self) -> bool:
        """Say whether the weight still has the values that folding gave it; true if nothing is folded.

        An unchanged version counter proves it without reading the weight. If the counter changed, as it does when a
        wrapper broadcasts equal values into the weight, the original is folded again and compared.
        """
        if self._folded_version is None or self._folded_version == self.weight._version:
            return True
        original = self._original()
        anew = None if original is None else self._folded_anew(original.to(self.weight))
        return anew is None or torch.equal(anew, self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast the layer; a selection is kept."""
        as_folded = self._weight_is_as_folded()
        super()._apply(fn, recurse)
        if self._folded_version is not None and as_folded:
            self._folded_version = self.weight._version  # a cast may have changed the version counter
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled layer, whose weight has a new version counter."""
        super().__setstate__(state)
        if self._folded_version is not None:
            self._folded_version = self.weight._version

    def _original(self) -> Tensor | None:
        """Return the original of a folded weight, or None if nothing is folded."""
        return self._host_original if self.original == "host" else self.original_weight
