"""The one model all clients train on: its adapter, a client's start put into it, deltas folded into its base."""

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
from fed.models.gradient_checkpointing import recomputing
from fed.seeding import torch_seed
from fed.types import ClientStart, Factors, ServerState

if TYPE_CHECKING:
    from fed.config import RunConfig


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
    def apply_delta(self, base_delta: Mapping[str, Tensor]) -> None:
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


@dataclass(frozen=True)
class SharedModel:
    """The one model all clients work on: its adapted layers, their shared base, the head that is trained, and R."""

    model: nn.Module
    handle: pk.Injected
    head: Mapping[str, nn.Parameter]
    device: torch.device
    base: SharedBase
    rank: int

    def load(self, factors: Mapping[str, Factors], head: Mapping[str, Tensor], scale: float | None = None) -> None:
        """Write the modules, A (m, K) and B (N, m) for every matrix, their scale and the head's values into the model.

        m need not be R: the layers take the rank of what they are given. Without a scale they keep theirs.
        """
        for matrix, layer in self.handle.layers.items():
            A, B = factors[matrix]
            if layer.rank != A.shape[0]:
                layer.rank = A.shape[0]
                layer.lora_A = nn.Parameter(layer.weight.new_empty(A.shape))
                layer.lora_B = nn.Parameter(layer.weight.new_empty(B.shape))
            layer.set_factors(A, B)
            layer.scale = layer.scale if scale is None else scale
        with torch.no_grad():
            for name, parameter in self.head.items():
                parameter.copy_(head[name])

    def load_server(self, server: ServerState) -> None:
        """Put the model where the server is; what it holds beyond R modules a matrix is folded into the base."""
        adapter = server.adapter
        factors = {matrix: (A[: self.rank], B[:, : self.rank]) for matrix, (A, B) in adapter.factors.items()}
        self.base.apply_delta(delta_beyond_rank(server, self.rank))
        self.load(factors, server.head, adapter.scale)


def delta_beyond_rank(server: ServerState, rank: int) -> Mapping[str, Tensor]:
    """Return base_delta + s Σ_{j≥rank} b_j a_jᵀ, (N, K) fp32 for every matrix; base_delta itself where m ≤ rank."""
    adapter = server.adapter
    if all(A.shape[0] <= rank for A, _ in adapter.factors.values()):
        return server.base_delta
    total = {}
    for matrix, (A, B) in adapter.factors.items():
        delta = adapter.scale * (B[:, rank:].double() @ A[rank:].double())
        total[matrix] = (delta + server.base_delta[matrix] if matrix in server.base_delta else delta).float()
    return total


@contextmanager
def adapted(config: RunConfig, model: nn.Module, head_names: Sequence[str]) -> Iterator[SharedModel]:
    """Give the model a fresh adapter, drawn from the run's seed, for as long as the body runs.

    The model moves to the run's device and is left with its own modules, base weights and head, bit for bit.
    With `train.gradient_checkpointing` its layers recompute activations meanwhile. Raises `FedError` where the device
    is not there or layers cannot recompute, `plora_kernels.PLoRAError` where the adapter does not fit the model.
    """
    device = find_device(config.device)
    model.to(device)
    trains_head = config.train.head != "freeze"
    settings = pk.PLoRAConfig(
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        rank_stabilized=config.adapter.rank_stabilized,
        dropout=config.adapter.dropout,
        target_modules=config.adapter.target_modules,
        exclude_modules=None if trains_head else _within(head_names),
        modules_to_save=tuple(head_names) if trains_head else (),
    )
    with torch_seed(device, config.seed, "adapter"):
        handle = pk.inject(model, settings)
    head = {
        f"{module}.{name}": parameter
        for module in handle.saved_modules
        for name, parameter in model.get_submodule(module).named_parameters()
    }
    shared = SharedModel(model, handle, head, device, SharedBase(handle.layers), config.adapter.rank)
    original = {name: parameter.detach().clone() for name, parameter in head.items()}
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
    """Put the model where a client starts, the unselected modules folded or frozen; undo it after.

    The base stays W + base_delta for the next client.
    """
    shared.base.apply_delta({} if base_delta is None else base_delta)
    shared.load(start.factors, head, start.scale)
    shared.handle.select(start.selected, unselected=start.unselected)
    try:
        yield
    finally:
        shared.handle.unfold()


def _within(modules: Sequence[str]) -> str:
    """Return an expression that matches the full names of these modules and of all they hold."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?"


def find_device(name: str) -> torch.device:
    """Return the device a configuration names; "auto" is CUDA where it is there, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FedError("device is 'cuda', which is not available here; 'cpu' or 'auto' would be right")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
