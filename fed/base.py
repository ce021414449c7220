"""The shared base: the adapted weights with what methods fold into them, and the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import plora_kernels as pk
from fed.errors import FedError


class SharedBase:
    """The weights W (N, K) of all adapted layers, of which every client starts with W + base_delta.

    The sum is taken in fp32 (fp64 for fp64 weights) and rounded once into the weight's dtype. The originals are copied
    once something is folded in, and always added to: taking it out leaves them bit for bit.
    """

    def __init__(self, layers: Mapping[str, pk.FusedPLoRALinear]) -> None:
        self._layers = layers
        self._originals: dict[str, Tensor] = {}
        self._held: Mapping[str, Tensor] = {}

    def check_foldable(self, method: str) -> None:
        """Raise FedError where a weight belongs to another module as well: folding would change that too."""
        for matrix, layer in self._layers.items():
            if layer.weight_is_tied:
                raise FedError(f"method is {method!r}, which folds into {matrix}, whose weight another module shares")

    @torch.no_grad()
    def hold(self, base_delta: Mapping[str, Tensor]) -> None:
        """Make every weight W + base_delta, (N, K) fp32 by matrix; a matrix that is not there gets its W back."""
        if base_delta is self._held or not (base_delta or self._held):
            return
        for matrix in {*base_delta, *self._held}:
            weight = self._layers[matrix].weight
            if matrix not in self._originals:
                self._originals[matrix] = weight.detach().clone()
            original = self._originals[matrix]
            weight.copy_(original + base_delta[matrix] if matrix in base_delta else original)
        self._held = base_delta

    def changed(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (weight, original) of every layer whose weight has something in it, by fold or by selection."""
        pairs = {}
        for matrix, layer in self._layers.items():
            weight = layer.weight.detach()
            original = self._originals[matrix] if matrix in self._held else layer.state_dict()["weight"]
            if original.data_ptr() != weight.data_ptr():
                pairs[matrix] = (weight, original)
        return pairs
