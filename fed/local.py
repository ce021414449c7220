"""One client's local training: the clients of a run take turns on one model, which is never copied."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import plora_kernels as pk
from fed.base import SharedBase
from fed.errors import FedError
from fed.footprint import SavedTensors, optimizer_bytes
from fed.losses import client_losses
from fed.recomputing import recomputing
from fed.samples import Split
from fed.streams import Source, torch_seed
from fed.types import Client, ClientStart, ClientUpdate, Factors, Footprint, ServerState, TailPenalty

if TYPE_CHECKING:
    from fed.config import RunConfig
    from fed.training_config import TrainConfig


@dataclass(frozen=True)
class Workplace:
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
        self.base.hold(beyond(server, self.rank))
        self.load(factors, server.head, adapter.scale)


def beyond(server: ServerState, rank: int) -> Mapping[str, Tensor]:
    """Return base_delta + s Σ_{j≥rank} b_j a_jᵀ, (N, K) fp32 for every matrix; base_delta itself where m ≤ rank."""
    adapter = server.adapter
    if all(A.shape[0] <= rank for A, _ in adapter.factors.values()):
        return server.base_delta
    total = {}
    for matrix, (A, B) in adapter.factors.items():
        delta = adapter.scale * (B[:, rank:].double() @ A[rank:].double())
        total[matrix] = (delta + server.base_delta[matrix] if matrix in server.base_delta else delta).float()
    return total


class Job(NamedTuple):
    """One client's local training: where it starts, its head, its data, how long and how fast, and its randomness."""

    client: Client
    start: ClientStart
    head: Mapping[str, Tensor]
    split: Split
    steps: int
    learning_rate: float
    rng: Source


@contextmanager
def adapted(config: RunConfig, model: nn.Module, head_names: Sequence[str]) -> Iterator[Workplace]:
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
    work = Workplace(model, handle, head, device, SharedBase(handle.layers), config.adapter.rank)
    original = {name: parameter.detach().clone() for name, parameter in head.items()}
    try:
        for layer in handle.layers.values():
            layer.check_selectable(config.adapter.unselected)
        with recomputing(model, config.train.gradient_checkpointing):
            yield work
    finally:
        work.base.hold({})
        work.load(handle.factors(), original)
        handle.restore()


@contextmanager
def started(
    work: Workplace, start: ClientStart, head: Mapping[str, Tensor], base_delta: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Put the model where a client starts, the unselected modules folded or frozen; undo it after.

    The base stays W + base_delta for the next client.
    """
    work.base.hold({} if base_delta is None else base_delta)
    work.load(start.factors, head, start.scale)
    work.handle.select(start.selected, unselected=start.unselected)
    try:
        yield
    finally:
        work.handle.unfold()


def train(work: Workplace, job: Job, settings: TrainConfig, measure: bool = False) -> ClientUpdate:
    """Train the selected modules, and the head if it is to be, on the job's batches of the client's samples.

    The body of `started`: the optimiser sees the compact A (r_i, K) and B (N, r_i) alone, or one of the two where the
    start holds the other fixed. The order of samples, LoRA dropout and the model's own are drawn from the job's source.
    Nothing is read from the device before the last step is done. With `measure` the update says what memory training
    took; the first step is watched for that.
    """
    compact = {matrix: (layer.lora_A, layer.lora_B) for matrix, layer in work.handle.layers.items()}
    parameters = [*trained_factors(compact, job.start.trained), *work.head.values()]
    optimizer = make_optimizer(parameters, settings, job.learning_rate)
    order, rng = batch_rows(len(job.split), settings.batch_size, job.steps, job.rng), job.rng
    total = torch.zeros((), device=work.device)
    saved = SavedTensors(work.model)
    work.model.train()
    with torch_seed(work.device, rng.seed, rng.round, rng.client, "dropout"):
        for step, rows in enumerate(order):
            key_dropout(work, rng, step)
            optimizer.zero_grad()
            with saved.watching(measure and step == 0):
                loss = client_losses(work.model, job.split.batch(rows), [len(rows)]).sum()
            (loss if job.start.penalty is None else loss + tail_penalty(compact, job.start.penalty)).backward()
            if settings.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            total += loss.detach()
    optimizer.zero_grad()
    factors = {matrix: (A.detach().clone(), B.detach().clone()) for matrix, (A, B) in compact.items()}
    head = {name: parameter.detach().clone() for name, parameter in work.head.items()}
    taken = Footprint(sum(map(Tensor.numel, parameters)), optimizer_bytes(optimizer), saved.size_bytes)
    return ended_with(job, settings, factors, head, total.item() / job.steps, taken if measure else None)


def ended_with(
    job: Job,
    settings: TrainConfig,
    factors: Mapping[str, Factors],
    head: Mapping[str, Tensor],
    loss: float,
    footprint: Footprint | None,
) -> ClientUpdate:
    """Return the update of a client that ended with these compact factors and head."""
    return ClientUpdate(
        client=job.client,
        factors=factors,
        selected=job.start.selected,
        head=head,
        weight=float(job.client.n_samples) if settings.weighting == "samples" else 1.0,
        steps=job.steps,
        loss=loss,
        sent=job.start.trained,
        footprint=footprint,
    )


def key_dropout(work: Workplace, rng: Source, step: int) -> None:
    """Give every layer that drops its seed for one step, keyed by (seed, round, client, step, matrix)."""
    for matrix, layer in work.handle.layers.items():
        if layer.dropout:
            layer.dropout_seed = rng.seed_for("lora dropout", step, matrix)


def trained_factors(compact: Mapping[str, tuple[nn.Parameter, nn.Parameter]], sides: str) -> list[nn.Parameter]:
    """Return the parameters of the sides that are trained, "AB", "A" or "B"; the others need no gradient from here."""
    chosen = []
    for pair in compact.values():
        for side, factor in zip("AB", pair, strict=True):
            factor.requires_grad_(side in sides)
            if side in sides:
                chosen.append(factor)
    return chosen


def tail_penalty(factors: Mapping[str, Factors], penalty: TailPenalty) -> Tensor:
    """Return λ Σ_matrices ‖A[first:]‖_F ‖B[:, first:]‖_F, differentiable."""
    first = penalty.first
    terms = [torch.linalg.vector_norm(A[first:]) * torch.linalg.vector_norm(B[:, first:]) for A, B in factors.values()]
    return penalty.weight * torch.stack(terms).sum()


def module_gradients(
    work: Workplace, server: ServerState, split: Split, batch_size: int, rng: Source
) -> dict[str, Tensor]:
    """Return (‖∂L/∂a_j‖² + ‖∂L/∂b_j‖²)^½ of all R modules, (R,) fp64 for every matrix, on a client's first batch.

    The model is at the server's state and in evaluation mode; nothing is changed.
    """
    work.load_server(server)
    work.model.eval()
    (rows,) = batch_rows(len(split), batch_size, 1, rng)
    factors = {matrix: (layer.lora_A, layer.lora_B) for matrix, layer in work.handle.layers.items()}
    flat = [factor for pair in factors.values() for factor in pair]
    gradients = iter(torch.autograd.grad(client_losses(work.model, split.batch(rows), [len(rows)]).sum(), flat))
    return {
        matrix: (next(gradients).double().square().sum(1) + next(gradients).double().square().sum(0)).sqrt().cpu()
        for matrix in factors
    }


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


def make_optimizer(
    parameters: Sequence[nn.Parameter], settings: TrainConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Return AdamW or SGD over `parameters`, in torch's fused form."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=learning_rate,
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
