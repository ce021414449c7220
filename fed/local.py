"""One client's local training: the clients of a run take turns on one model, which is never copied."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

import plora_kernels as pk
from fed.errors import FedError
from fed.noise import held_update
from fed.samples import Split
from fed.streams import Source, torch_seed
from fed.types import Client, ClientStart, ClientUpdate, Factors

if TYPE_CHECKING:
    from fed.config import RunConfig, TrainConfig


@dataclass(frozen=True)
class Workplace:
    """The one model all clients work on, with its adapted layers and the head parameters that are trained."""

    model: nn.Module
    handle: pk.Injected
    head: Mapping[str, nn.Parameter]
    device: torch.device

    def load(self, factors: Mapping[str, Factors], head: Mapping[str, Tensor]) -> None:
        """Write all modules, A (R, K) and B (N, R) for every matrix, and the head's values into the model."""
        self.handle.set_factors(factors)
        with torch.no_grad():
            for name, parameter in self.head.items():
                parameter.copy_(head[name])


@contextmanager
def adapted(config: RunConfig, model: nn.Module, head_names: Sequence[str]) -> Iterator[Workplace]:
    """Give the model a fresh adapter, drawn from the run's seed, for as long as the body runs.

    The model moves to the run's device and is left with its own modules, base weights and head, bit for bit.
    Raises `FedError` where the device is not there, `plora_kernels.PLoRAError` where the adapter does not
    fit the model.
    """
    device = find_device(config.device)
    model.to(device)
    trains_head = config.train.head == "train"
    settings = pk.PLoRAConfig(
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        rank_stabilized=config.adapter.rank_stabilized,
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
    work = Workplace(model, handle, head, device)
    original = {name: parameter.detach().clone() for name, parameter in head.items()}
    try:
        for layer in handle.layers.values():
            layer.check_selectable(config.adapter.unselected)
        yield work
    finally:
        work.load(handle.factors(), original)
        handle.restore()


@contextmanager
def started(work: Workplace, start: ClientStart, head: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the model where a client starts, the unselected modules folded or frozen; undo it after."""
    work.load(start.factors, head)
    work.handle.select(start.selected, unselected=start.unselected)
    try:
        yield
    finally:
        work.handle.unfold()


def held_updates(work: Workplace, start: ClientStart) -> Iterator[tuple[str, Tensor]]:
    """Yield every matrix and the ΔW (N, K) fp64 its layer really holds while the selection stands."""
    everything = work.handle.factors()
    for matrix, layer in work.handle.layers.items():
        A, B = everything[matrix]
        if start.unselected == "folded":
            chosen = list(start.selected[matrix])
            A, B = A[chosen], B[:, chosen]
        original = layer.state_dict()["weight"]
        yield matrix, held_update(layer.weight.detach(), original, A, B, start.scale)


def train(
    work: Workplace,
    client: Client,
    start: ClientStart,
    split: Split,
    settings: TrainConfig,
    steps: int,
    rng: Source,
) -> ClientUpdate:
    """Train the selected modules, and the head if it is to be, on `steps` batches of the client's samples.

    The body of `started`: the optimiser sees the compact A (r_i, K) and B (N, r_i) alone. The order of
    samples and the model's own dropout are drawn from `rng`. Nothing is read from the device before the last
    step is done.
    """
    layers = work.handle.layers
    compact = {matrix: (layer.lora_A, layer.lora_B) for matrix, layer in layers.items()}
    parameters = [factor for pair in compact.values() for factor in pair] + list(work.head.values())
    optimizer = make_optimizer(parameters, settings)
    order = batch_rows(len(split), settings.batch_size, steps, rng)
    total = torch.zeros((), device=work.device)
    work.model.train()
    with torch_seed(work.device, rng.seed, rng.round, rng.client, "dropout"):
        for rows in order:
            optimizer.zero_grad()
            loss = work.model(**split.batch(rows)).loss
            loss.backward()
            if settings.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            total += loss.detach()
    optimizer.zero_grad()
    return ClientUpdate(
        client=client,
        factors={matrix: (A.detach().clone(), B.detach().clone()) for matrix, (A, B) in compact.items()},
        selected=start.selected,
        head={name: parameter.detach().clone() for name, parameter in work.head.items()},
        weight=float(client.n_samples) if settings.weighting == "samples" else 1.0,
        steps=steps,
        loss=total.item() / steps,
    )


def fault(update: ClientUpdate) -> str | None:
    """Say what makes an update unusable, its loss or a value that is not finite; None where nothing does."""
    if not math.isfinite(update.loss):
        return f"its training loss is {update.loss}"
    tensors = {
        f"{matrix} lora_{side}": factor
        for matrix, pair in update.factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    tensors |= update.head
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return next(
        (f"its {name} holds NaN or infinity" for name, fine in zip(tensors, finite, strict=True) if not fine),
        None,
    )


def make_optimizer(parameters: Sequence[nn.Parameter], settings: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW or SGD over `parameters`, in torch's fused form."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def batch_rows(n_samples: int, batch_size: int, steps: int, rng: Source) -> Tensor:
    """Return sample indices (steps, min(batch_size, n_samples)) int64, permutation after permutation."""
    width = min(batch_size, n_samples)
    epochs = math.ceil(steps * width / n_samples)
    order = np.concatenate([rng.permutation(n_samples, "order", epoch) for epoch in range(epochs)])
    return torch.from_numpy(order[: steps * width]).view(steps, width)


def _within(modules: Sequence[str]) -> str:
    """Return an expression that matches the full names of these modules and of all they hold."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?"


def find_device(name: str) -> torch.device:
    """Return the device a configuration names; "auto" is CUDA where it is there, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FedError("device is 'cuda', which is not available here; 'cpu' or 'auto' would be right")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
