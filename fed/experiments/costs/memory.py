"""Memory of a client, a cohort and the server, and what a run keeps on the disk, from the model's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

import plora_kernels as pk
from fed.config import RunConfig
from fed.data.tables import Split
from fed.experiments.costs.workload import EqualRows, Workload
from fed.models.head import head_names
from fed.models.shared_model import SharedModel, adapter_settings
from fed.models.weightless import outline
from fed.simulation.clients import estimate
from fed.simulation.communication import factor_bytes
from fed.training.memory import state_bytes, tensor_bytes
from fed.training.memory_estimate import cohort_memory

# What every client takes in the server's memory besides its rows' numbers (8 bytes each), drawn or not, and what a
# client that keeps a file takes more: Python objects, as `python -m bench.scale` measures them.
CLIENT_BYTES, STORED_BYTES = 1200, 1400
# The same in the text of a checkpoint: the round that a client was in last, and the entry of its file.
CLIENT_CHARACTERS, STORED_CHARACTERS = 5, 125
_TENSOR_HEADER = 110  # the characters of a tensor's entry in a safetensors file, but for its name


class TrainingMemory(NamedTuple):
    """The bytes that training takes in a process that holds the base: the base, and all the rest."""

    base_bytes: int
    training_bytes: int

    @property
    def total_bytes(self) -> int:
        """The bytes in all."""
        return sum(self)


class ServerMemory(NamedTuple):
    """The bytes of the server's state, between rounds and beside the shared model.

    `adapter_bytes` are factors, head, visits and moments; `folded_bytes` what is folded into the base in fp32 and the
    original weights that it is added to; `updates_bytes` the starts and updates of a round, which are held at once;
    `working_bytes` what aggregating them takes more.
    """

    adapter_bytes: int
    folded_bytes: int
    updates_bytes: int
    working_bytes: int

    @property
    def total_bytes(self) -> int:
        """The bytes in all, while a round is aggregated."""
        return sum(self)


class Disk(NamedTuple):
    """The bytes on the disk: a checkpoint's tensors and text, of which two are kept, and the file of one client."""

    tensors_bytes: int
    text_bytes: int
    client_bytes: int

    def total_bytes(self, kept: int) -> int:
        """Return the bytes of both checkpoints and the files of `kept` clients."""
        return 2 * (self.tensors_bytes + self.text_bytes) + kept * self.client_bytes


def client_memory(config: RunConfig, shared: SharedModel, load: Workload, rank: int) -> TrainingMemory:
    """Return the memory of training one client that trains `rank` modules a matrix.

    Of a classifier it is `fed.simulation.clients.estimate`, of a language model
    `fed.training.memory_estimate.cohort_memory` with one client. The allocator's overhead is not counted.
    """
    if load.answer:
        found = _of_language_model(config, load, 1, rank)
        held = config.adapter.rank - rank if config.adapter.unselected == "frozen" and _selects(config) else 0
        frozen = held * factor_bytes({name: _one(layer) for name, layer in shared.handle.layers.items()})
        return TrainingMemory(found.base_bytes, found.training_bytes + frozen)
    rows = EqualRows.of(shared.model, load, load.width(config))
    return _without_base(shared, estimate(shared, config, Split.whole(rows)).of(rank))


def cohort_bytes(config: RunConfig, shared: SharedModel, load: Workload, clients: int) -> TrainingMemory:
    """Return the memory of training `clients` clients together over one base, each with all R modules."""
    rank = config.adapter.rank
    if load.answer:
        return _of_language_model(config, load, clients, rank)
    together = clients * load.width(config)
    train = config.train.model_copy(update={"batch_size": together})
    adapter = config.adapter.model_copy(update={"unselected": "folded"})  # no modules beside those that are counted
    wide = config.model_copy(update={"train": train, "adapter": adapter})
    rows = Split.whole(EqualRows.of(shared.model, load, together))
    one = _without_base(shared, estimate(shared, wide, rows).of(rank))
    factors = [factor for layer in shared.handle.layers.values() for factor in (layer.lora_A, layer.lora_B)]
    own = 2 * tensor_bytes(factors) + tensor_bytes(shared.head.values())
    for tensors in (factors, [*shared.head.values()]):
        numbers = sum(tensor.numel() for tensor in tensors)
        own += state_bytes(config.train, numbers, 0, tensors[0].element_size()) if tensors else 0
    return TrainingMemory(one.base_bytes, one.training_bytes + (clients - 1) * own)


def server_memory(config: RunConfig, shared: SharedModel, ranks: Sequence[int]) -> ServerMemory:
    """Return the memory of the server's state in a round of clients of these ranks.

    Σ_matrices, with itemsize that of the factors, n = Σ r_i and R the adapter's rank: factors m (K + N) · itemsize, m
    = R, or min(n, N, K) if more, of FlexLoRA and raFLoRA; visits 8 R where modules are averaged one by one; moments
    16 R (K + N) with fedadam; what is folded 4 N K, and as much as the weight for its original; updates n (K + N) ·
    itemsize, and a head for each client. Aggregating takes fp64 of one matrix, and another 4 N K for the next state.
    """
    from fed import methods

    layers, rank, sent = shared.handle.layers.values(), config.adapter.rank, sum(ranks)
    method, width = config.method, next(iter(shared.handle.layers.values())).lora_A.element_size()
    adapter = tensor_bytes(shared.head.values())
    folded = updates = working = 0
    for layer in layers:
        K, N = layer.in_features, layer.out_features
        modules = max(rank, min(sent, N, K)) if method in ("flexlora", "raflora") else rank
        adapter += modules * (K + N) * width
        adapter += 8 * rank * methods.find(method).by_module
        adapter += 16 * rank * (K + N) * (config.server.optimizer == "fedadam")
        folds = method in ("flora", "fedex-lora") or modules > rank
        folded += folds * N * K * (4 + layer.weight.element_size())
        updates += sent * (K + N) * width * (2 if method == "flora" else 1)
        working = max(working, 8 * sent * (K + N) + 8 * N * K * folds)
    working += folded and sum(4 * layer.in_features * layer.out_features for layer in layers)
    updates += len(ranks) * tensor_bytes(shared.head.values())
    return ServerMemory(adapter, folded, updates, working)


def disk(config: RunConfig, shared: SharedModel, ranks: Sequence[int], clients: int, kept: int, rounds: int) -> Disk:
    """Return what a run has on the disk after `rounds` rounds, when `kept` of its clients have taken part."""
    memory = server_memory(config, shared, ranks)
    layers = shared.handle.layers
    folded = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
    folds = config.method in ("flora", "fedex-lora")
    tensors = memory.adapter_bytes + folded * folds
    count = 2 * len(layers) + len(shared.head) + len(layers) * folds
    keeps = client_file_bytes(config, shared)
    text = clients * CLIENT_CHARACTERS + (kept * STORED_CHARACTERS if keeps else 0) + 12 * rounds * folds
    return Disk(tensors + count * _TENSOR_HEADER, text, keeps)


def client_file_bytes(config: RunConfig, shared: SharedModel) -> int:
    """Return the bytes of what a client keeps between rounds: its B, its head, and where noise is measured its end."""
    layers = {name: _one(layer) for name, layer in shared.handle.layers.items()}
    rank, found = config.adapter.rank, 0
    if config.method == "fedsa-lora":
        found += rank * factor_bytes(layers, "B")
    if config.train.head == "personal":
        found += tensor_bytes(shared.head.values())
    if config.measure.noise:
        ranks = config.clients.ranks
        ended = rank if _selects(config) else sum(ranks) / len(ranks)
        found += round(ended * factor_bytes(layers))
    return found


def population_bytes(config: RunConfig, shared: SharedModel, load: Workload, clients: int) -> int:
    """Return the server's memory for all clients, drawn or not, once each has taken part."""
    own = CLIENT_BYTES + (STORED_BYTES if client_file_bytes(config, shared) else 0)
    return clients * (own + 8 * load.client_rows)


def _of_language_model(config: RunConfig, load: Workload, clients: int, rank: int) -> TrainingMemory:
    device = "cpu" if config.device == "cpu" else "cuda"
    with unset_fake_temporarily():
        model = outline(config, load.labels)
        settings = replace(adapter_settings(config, head_names(model)), rank=rank)
        sizes = load.tokens, load.answer, config.model.quantize, device
        found = cohort_memory(model, settings, config.train, clients, *sizes)
    return TrainingMemory(found.base_bytes, found.total_bytes - found.base_bytes)


def _without_base(shared: SharedModel, total: int) -> TrainingMemory:
    own = {id(factor) for layer in shared.handle.layers.values() for factor in (layer.lora_A, layer.lora_B)}
    everything = (*shared.model.parameters(), *shared.model.buffers())
    base = tensor_bytes(tensor for tensor in everything if id(tensor) not in own)
    return TrainingMemory(base, total - base)


def _one(layer: pk.FusedPLoRALinear) -> tuple[Tensor, Tensor]:
    """Return one module of a layer, for its size."""
    return layer.lora_A[:1], layer.lora_B[:, :1]


def _selects(config: RunConfig) -> bool:
    return config.method == "fed-plora"
