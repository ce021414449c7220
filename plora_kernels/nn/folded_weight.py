"""A weight into which modules are folded, and the way back to the original, bit for bit."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from plora_kernels.errors import ConfigError

ORIGINALS = ("device", "host")


def check_original(original: str) -> None:
    """Raise ConfigError unless `original` is a place where a folded weight's original can be kept."""
    if original not in ORIGINALS:
        raise ConfigError(f"original is {original!r}; it may be 'device' or 'host'")


class FoldedWeight(nn.Module):
    """A layer with a `weight` (N, K) that other values may take the place of, and that is put back to what it was.

    The original is kept on the weight's device (`original_weight`, a buffer that is never saved) or in host memory. On
    the device it keeps its memory: the parameter, still the same object, lives in other memory meanwhile. The weight's
    version tells whether somebody else changed it in between.
    """

    weight: nn.Parameter
    original_weight: Tensor | None

    def _keep_originals(self, original: str) -> None:
        """Say where originals are kept, "device" or "host"; nothing is folded yet."""
        self.original = original
        self.register_buffer("original_weight", None, persistent=False)
        self._host_original: Tensor | None = None
        self._folded_version: int | None = None

    def _keep_original(self) -> tuple[Tensor, Tensor | None]:
        """Keep the original; return the weight to fold into, and memory for the result (None: in place).

        On its device the original keeps its memory: the fold goes to memory of its own, which `_take_folded` gives to
        the weight, so that W is read once and written once.
        """
        weight = self.weight.detach()
        if self.original == "host":
            self._host_original = weight.to("cpu", copy=True)
            return self.weight, None
        return weight, torch.empty_like(weight)

    def _take_folded(self, folded: Tensor) -> None:
        """Let the weight hold what modules were folded into: itself, or memory that takes the place of its own."""
        if folded is not self.weight:
            self.original_weight = self.weight.data
            self._give_memory(folded)
        self._folded_version = self.weight._version

    def _folded_anew(self, weight: Tensor) -> Tensor | None:
        """Return the original `weight` folded once more as the layer folds now; None if it does not."""
        raise NotImplementedError

    def _give_memory(self, values: Tensor) -> None:
        """Let the weight, still the same parameter, live in the memory of `values`; autograd counts it as a change."""
        self.weight.data = values
        torch.autograd.graph.increment_version(self.weight)

    def _drop_original(self) -> None:
        """Put the weight back to its original, if one is kept, and keep it no longer."""
        original = self._original()
        if original is not None:
            weight = self.weight
            alike = (original.dtype, original.device, original.shape) == (weight.dtype, weight.device, weight.shape)
            if alike and self.original == "device":
                self._give_memory(original)
            else:
                weight.copy_(original)
        self.original_weight = self._host_original = self._folded_version = None

    def _weight_is_as_folded(self) -> bool:
        """Say whether the weight still is what folding made of it; true if nothing is folded.

        Its version tells without looking. Where that moved, as a wrapper's broadcast of equal values moves it, the
        weight is compared with its original folded anew.
        """
        if self._folded_version is None or self._folded_version == self.weight._version:
            return True
        original = self._original()
        anew = None if original is None else self._folded_anew(original.to(self.weight))
        return anew is None or torch.equal(anew, self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast the layer, a standing selection included."""
        as_folded = self._weight_is_as_folded()
        super()._apply(fn, recurse)
        if self._folded_version is not None and as_folded:
            self._folded_version = self.weight._version  # a cast may give the weight a new count
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled layer, whose weight counts its changes anew."""
        super().__setstate__(state)
        if self._folded_version is not None:
            self._folded_version = self.weight._version

    def _original(self) -> Tensor | None:
        """Return the original of a folded weight, or None if nothing is folded."""
        return self._host_original if self.original == "host" else self.original_weight
