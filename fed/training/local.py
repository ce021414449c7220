"""Local training of one client at a time, on the one model that all clients of a run share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fed import interruption
from fed.data.tables import Split
from fed.models.shared_model import SharedModel
from fed.seeding import ClientRandom, torch_seed
from fed.training.batching import divide, find_way
from fed.training.losses import client_losses
from fed.training.memory import SavedTensors, optimizer_bytes
from fed.types import Client, ClientStart, ClientUpdate, Factors, Footprint, ServerState, TailPenalty

if TYPE_CHECKING:
    from fed.config.training import TrainConfig


class Job(NamedTuple):
    """One client's local training: its start, head, samples, local steps, learning rate and random streams."""

    client: Client
    start: ClientStart
    head: Mapping[str, Tensor]
    split: Split
    steps: int
    learning_rate: float
    rng: ClientRandom


def train(shared: SharedModel, job: Job, settings: TrainConfig, measure: bool = False) -> ClientUpdate:
    """Train a client's selected modules, and the head unless it is frozen, and return its update.

    Call it within `fed.models.shared_model.started`, which loads the job's start. The optimiser holds only the compact
    A (r_i, K) and B (N, r_i), or only one of them if the start holds the other fixed. The order of samples, LoRA
    dropout and the model's own dropout are drawn from the job's `rng`. Nothing is read from the device before the last
    step is done, so the CPU does not wait. With `measure` the update has a footprint; activations are counted in the
    first step.
    """
    compact = {matrix: (layer.lora_A, layer.lora_B) for matrix, layer in shared.handle.layers.items()}
    parameters = [*trained_factors(compact, job.start.trained), *shared.head.values()]
    optimizer = make_optimizer(parameters, settings, job.learning_rate)
    order, rng = BatchOrder(len(job.split), settings.batch_size, job.rng), job.rng
    total = torch.zeros((), device=shared.device)
    saved, tokens, positions = SavedTensors(shared.model), 0, 0
    drops = any(layer.dropout for layer in shared.handle.layers.values())
    way = find_way(settings, shared.model, job.split.table, whole=drops)
    shared.model.train()
    with torch_seed(shared.device, rng.seed, rng.round, rng.client, "dropout"):
        for step in range(job.steps):
            interruption.check()
            rows = order.rows(step)
            key_dropout(shared, rng, step)
            optimizer.zero_grad()
            if job.start.penalty is not None:
                tail_penalty(compact, job.start.penalty).backward()
            losses = []
            for part in divide(job.split.table, [job.split.rows[rows]], way):
                with saved.watching(measure and step == 0):
                    loss = client_losses(shared.model, part.batch, part.sizes, part.counted).sum()
                    if part.shares is not None:
                        loss = loss * float(part.shares)
                loss.backward()
                losses.append(loss.detach())
                positions += part.positions[0]
            total += sum(losses)
            tokens += int(job.split.lengths(rows).sum())
            if settings.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
    optimizer.zero_grad()
    factors = {matrix: (A.detach().clone(), B.detach().clone()) for matrix, (A, B) in compact.items()}
    head = {name: parameter.detach().clone() for name, parameter in shared.head.items()}
    taken = Footprint(sum(map(Tensor.numel, parameters)), optimizer_bytes(optimizer), saved.size_bytes)
    update = ended_with(job, settings, factors, head, total.item() / job.steps, taken if measure else None)
    return replace(update, tokens=tokens, positions=positions)


def ended_with(
    job: Job,
    settings: TrainConfig,
    factors: Mapping[str, Factors],
    head: Mapping[str, Tensor],
    loss: float,
    footprint: Footprint | None,
) -> ClientUpdate:
    """Return the update of a client that ended its training with these compact factors and this head."""
    return ClientUpdate(
        client=job.client,
        factors=factors,
        selected=job.start.selected,
        head=head,
        weight=weight_of(job.client, settings),
        steps=job.steps,
        loss=loss,
        sent=job.start.trained,
        footprint=footprint,
    )


def weight_of(client: Client, settings: TrainConfig) -> float:
    """Return a client's aggregation weight p_i up to a common factor: 1, or its number of samples."""
    return float(client.n_samples) if settings.weighting == "samples" else 1.0


def key_dropout(shared: SharedModel, rng: ClientRandom, step: int) -> None:
    """Set the dropout seed of every layer with LoRA dropout for one step, from (seed, round, client, step, matrix)."""
    for matrix, layer in shared.handle.layers.items():
        if layer.dropout:
            layer.dropout_seed = rng.seed_for("lora dropout", step, matrix)


def trained_factors(compact: Mapping[str, tuple[nn.Parameter, nn.Parameter]], sides: str) -> list[nn.Parameter]:
    """Return the parameters of the trained factors, `sides` being "AB", "A" or "B"; set `requires_grad` accordingly."""
    chosen = []
    for pair in compact.values():
        for side, factor in zip("AB", pair, strict=True):
            factor.requires_grad_(side in sides)
            if side in sides:
                chosen.append(factor)
    return chosen


def tail_penalty(factors: Mapping[str, Factors], penalty: TailPenalty) -> Tensor:
    """Return λ Σ_matrices ‖A[first:]‖_F ‖B[:, first:]‖_F, a differentiable scalar."""
    first = penalty.first
    terms = [torch.linalg.vector_norm(A[first:]) * torch.linalg.vector_norm(B[:, first:]) for A, B in factors.values()]
    return penalty.weight * torch.stack(terms).sum()


def module_gradients(
    shared: SharedModel, server: ServerState, split: Split, batch_size: int, rng: ClientRandom
) -> dict[str, Tensor]:
    """Return the gradient norms (‖∂L/∂a_j‖² + ‖∂L/∂b_j‖²)^½ of all R modules, (R,) fp64 on the CPU by matrix.

    L is the loss of the client's first batch, in evaluation mode and at the server's state, which is loaded into the
    model and left there.
    """
    shared.load_server(server)
    shared.model.eval()
    (rows,) = batch_rows(len(split), batch_size, 1, rng)
    factors = {matrix: (layer.lora_A, layer.lora_B) for matrix, layer in shared.handle.layers.items()}
    flat = [factor for pair in factors.values() for factor in pair]
    losses = client_losses(shared.model, split.batch(rows), [len(rows)], split.counted(rows))
    gradients = iter(torch.autograd.grad(losses.sum(), flat))
    return {
        matrix: (next(gradients).double().square().sum(1) + next(gradients).double().square().sum(0)).sqrt().cpu()
        for matrix in factors
    }


def make_optimizer(
    parameters: Sequence[nn.Parameter], settings: TrainConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Return AdamW or SGD over `parameters`, in torch's fused implementation."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters, lr=learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
    )


def batch_rows(n_samples: int, batch_size: int, steps: int, rng: ClientRandom) -> Tensor:
    """Return the sample indices of each batch, (steps, min(batch_size, n_samples)) int64; see `BatchOrder`."""
    order = BatchOrder(n_samples, batch_size, rng)
    return torch.stack([order.rows(step) for step in range(steps)])


class BatchOrder:
    """The sample indices of a client's batches in a round, drawn as they are asked for.

    They go through one random permutation of the samples after another, so a batch may contain samples of two epochs.
    However many steps there are, only the permutations of the last batch are held.
    """

    def __init__(self, n_samples: int, batch_size: int, rng: ClientRandom) -> None:
        self.width = min(batch_size, n_samples)
        self._n_samples, self._rng = n_samples, rng
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def rows(self, step: int) -> Tensor:
        """Return the batch of a step, (width,) int64; it depends on the step only, not on what was asked for before."""
        epoch, begin = divmod(step * self.width, self._n_samples)
        last = epoch + (begin + self.width > self._n_samples)  # a batch reaches into the next epoch at most
        self._epochs = {number: self._epoch(number) for number in range(epoch, last + 1)}
        rows = self._epochs[epoch][begin : begin + self.width]
        if last > epoch:
            rows = np.concatenate([rows, self._epochs[last][: self.width - len(rows)]])
        return torch.from_numpy(rows)

    def _epoch(self, number: int) -> NDArray[np.int64]:
        if number in self._epochs:
            return self._epochs[number]
        return self._rng.permutation(self._n_samples, "order", number)
