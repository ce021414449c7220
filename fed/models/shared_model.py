"""The one model that all clients train on: its adapter, loading a client's start, and folding into its base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import plora_kernels as pk
from fed.errors import FedError
from fed.models.devices import find_device
from fed.models.gradient_checkpointing import recomputing
from fed.seeding import torch_seed
from fed.types import ClientStart, Factors, ServerState

if TYPE_CHECKING:
    from fed.config import RunConfig


class SharedBase:
    """The weights W (N, K) of all adapted layers, into which the server's base_delta is folded as W + base_delta.

    The sum is computed in fp32 (fp64 for fp64 weights) and rounded once to the weight's dtype. Before anything is
    folded into a weight its original is copied, and every fold starts from that copy, so that the weight can be
    restored bit for bit.
    """

    def __init__(self, layers: Mapping[str, pk.FusedPLoRALinear]) -> None:
        self._layers = layers
        self._originals: dict[str, Tensor] = {}
        self._held: Mapping[str, Tensor] = {}

    def check_foldable(self, method: str) -> None:
        """Raise FedError if a weight is shared with another module, because folding would change that module too."""
        for matrix, layer in self._layers.items():
            if layer.weight_is_tied:
                raise FedError(f"method is {method!r}, which folds into {matrix}, whose weight another module shares")

    @torch.no_grad()
    def apply_delta(self, base_delta: Mapping[str, Tensor]) -> None:
        """Set every weight to W + base_delta, (N, K) fp32 by matrix; a matrix not in `base_delta` is set to its W."""
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
        """Return (weight, original) of every layer with a base_delta or unselected modules folded into its weight."""
        pairs = {}
        for matrix, layer in self._layers.items():
            weight = layer.weight.detach()
            original = self._originals[matrix] if matrix in self._held else layer.state_dict()["weight"]
            if original.data_ptr() != weight.data_ptr():
                pairs[matrix] = (weight, original)
        return pairs


@dataclass(frozen=True)
class SharedModel:
    """The one model that all clients train on: its adapted layers, their base, the trained head, and `rank`, R."""

    model: nn.Module
    handle: pk.Injected
    head: Mapping[str, nn.Parameter]
    device: torch.device
    base: SharedBase
    rank: int

    def load(self, factors: Mapping[str, Factors], head: Mapping[str, Tensor], scale: float | None = None) -> None:
        """Write modules, A (m, K) and B (N, m) for every matrix, their scale and the head's values into the model.

        m may differ from R; a layer's rank becomes m. Without `scale` the layers keep theirs.
        """
        for matrix, layer in self.handle.layers.items():
            A, B = factors[matrix]
            if layer.rank != A.shape[0]:
                layer.rank = A.shape[0]
                layer.lora_A = nn.Parameter(layer.lora_A.new_empty(A.shape))
                layer.lora_B = nn.Parameter(layer.lora_B.new_empty(B.shape))
            layer.set_factors(A, B)
            layer.scale = layer.scale if scale is None else scale
        with torch.no_grad():
            for name, parameter in self.head.items():
                parameter.copy_(head[name])

    def load_server(self, server: ServerState) -> None:
        """Load the server's state into the model; modules beyond the first R of a matrix are folded into the base."""
        adapter = server.adapter
        factors = {matrix: (A[: self.rank], B[:, : self.rank]) for matrix, (A, B) in adapter.factors.items()}
        self.base.apply_delta(delta_beyond_rank(server, self.rank))
        self.load(factors, server.head, adapter.scale)


def delta_beyond_rank(server: ServerState, rank: int) -> Mapping[str, Tensor]:
    """Return base_delta + s Σ_{j≥rank} b_j a_jᵀ, (N, K) fp32 by matrix, or base_delta itself if no m exceeds `rank`."""
    adapter = server.adapter
    if all(A.shape[0] <= rank for A, _ in adapter.factors.values()):
        return server.base_delta
    total = {}
    for matrix, (A, B) in adapter.factors.items():
        delta = adapter.scale * (B[:, rank:].double() @ A[rank:].double())
        total[matrix] = (delta + server.base_delta[matrix] if matrix in server.base_delta else delta).float()
    return total


def adapter_settings(config: RunConfig, head_names: Sequence[str]) -> pk.PLoRAConfig:
    """Return the settings of a run's adapter; the modules of the head are trained whole, or, frozen, left alone."""
    trains_head = config.train.head != "freeze"
    return pk.PLoRAConfig(
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        rank_stabilized=config.adapter.rank_stabilized,
        dropout=config.adapter.dropout,
        adapter_dtype=config.adapter.dtype,
        target_modules=config.adapter.target_modules,
        exclude_modules=None if trains_head or not head_names else _within(head_names),
        modules_to_save=tuple(head_names) if trains_head else (),
    )


def shared_with(handle: pk.Injected, model: nn.Module, device: torch.device) -> SharedModel:
    """Return the shared model of an adapter that was injected into a model on this device."""
    head = {
        f"{module}.{name}": parameter
        for module in handle.saved_modules
        for name, parameter in model.get_submodule(module).named_parameters()
    }
    rank = next(iter(handle.layers.values())).rank
    return SharedModel(model, handle, head, device, SharedBase(handle.layers), rank)


@contextmanager
def adapted(config: RunConfig, model: nn.Module, head_names: Sequence[str]) -> Iterator[SharedModel]:
    """Within the context, give the model a new adapter, initialised from the run's seed.

    The model moves to the run's device. At the end its own modules, base weights and head are restored bit for bit.
    With `train.gradient_checkpointing` its layers recompute activations within the context. Raises `FedError` if the
    device is not available or the model does not support gradient checkpointing, and `plora_kernels.PLoRAError` if the
    adapter does not fit the model.
    """
    device = find_device(config.device)
    if any(value.device.type != device.type for value in model.parameters()):
        model.to(device)  # libraries of quantisation refuse it, wherever a model is
    with torch_seed(device, config.seed, "adapter"):
        handle = pk.inject(model, adapter_settings(config, head_names))
    shared = shared_with(handle, model, device)
    original = {name: parameter.detach().clone() for name, parameter in shared.head.items()}
    try:
        for layer in handle.layers.values():
            layer.check_selectable(config.adapter.unselected)
        with recomputing(model, config.train.gradient_checkpointing):
            yield shared
    finally:
        shared.base.apply_delta({})
        shared.load(handle.factors(), original)
        handle.restore()


@contextmanager
def started(
    shared: SharedModel, start: ClientStart, head: Mapping[str, Tensor], base_delta: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Within the context, load a client's start into the model, with the unselected modules folded or frozen.

    At the end the modules are unfolded; the base stays at W + base_delta for the next client.
    """
    shared.base.apply_delta({} if base_delta is None else base_delta)
    shared.load(start.factors, head, start.scale)
    shared.handle.select(start.selected, unselected=start.unselected)
    try:
        yield
    finally:
        shared.handle.unfold()


def _within(modules: Sequence[str]) -> str:
    """Return a regular expression that matches the full names of these modules and of all their submodules."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?"
