"""The inputs of every provider of a case, one frozen model and each client's values and batch, and its interface."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from bench.simulation.cases import ALPHA, RANK, SimulationCase
from bench.simulation.models import HEADS, adapted_names, build_model

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """The tensors from which all providers of a case start.

    `matrices` are the adapted linear layers by name and `head` the module that is trained in full. `starts` holds for
    every client its `<matrix>.lora_A` (R, K), `<matrix>.lora_B` (N, R) and the head's parameters, `batches` the
    model's keyword arguments, the first dimension of each the client's rows.
    """

    model: nn.Module
    matrices: tuple[str, ...]
    head: str
    starts: tuple[Values, ...]
    batches: tuple[Values, ...]

    @property
    def scale(self) -> float:
        return ALPHA / RANK

    def joined(self) -> Values:
        """Return the cohort's batch: every client's rows, one client after the other."""
        return {name: torch.cat([batch[name] for batch in self.batches]) for name in self.batches[0]}

    def in_dtype(self, dtype: torch.dtype) -> Problem:
        """Return the same problem in another precision, with a model of its own."""
        return replace(
            self,
            model=copy.deepcopy(self.model).to(dtype),
            starts=tuple(_cast(start, dtype) for start in self.starts),
            batches=tuple(_cast(batch, dtype) for batch in self.batches),
        )


def make_problem(case: SimulationCase, device: torch.device, seed: int = 0) -> Problem:
    """Draw a case's tensors from a seed. B is not zero: the gradient of A would be."""
    model = build_model(case.model, device, case.torch_dtype)
    head = HEADS[case.model.family]
    matrices = adapted_names(model, head)
    generator = torch.Generator(device).manual_seed(seed + 1)
    starts = tuple(_start(model, matrices, head, generator) for _ in range(case.cohort))
    batches = tuple(_batch(case, device, generator) for _ in range(case.cohort))
    return Problem(model, matrices, head, starts, batches)


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser of all providers: AdamW in torch's fused form."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def _start(model: nn.Module, matrices: tuple[str, ...], head: str, generator: torch.Generator) -> Values:
    values = {}
    for matrix in matrices:
        weight = model.get_parameter(f"{matrix}.weight")
        n, k = weight.shape
        values[f"{matrix}.lora_A"] = _normal(weight, (RANK, k), 1 / k, generator)
        values[f"{matrix}.lora_B"] = _normal(weight, (n, RANK), 1 / (100 * RANK), generator)
    for name, parameter in model.get_submodule(head).named_parameters():
        values[f"{head}.{name}"] = parameter + _normal(parameter, tuple(parameter.shape), 1e-4, generator)
    return values


def _batch(case: SimulationCase, device: torch.device, generator: torch.Generator) -> Values:
    """Return rows of one length, so that no provider needs an attention mask."""
    labels = torch.randint(case.model.labels, (case.batch,), generator=generator, device=device)
    if case.model.family == "vit":
        images = torch.randn(case.batch, 1, 8, 8, generator=generator, device=device)
        return {"pixel_values": images.to(case.torch_dtype), "labels": labels}
    rows = (case.batch, case.length)
    tokens = torch.randint(1, case.model.vocabulary, rows, generator=generator, device=device)
    return {"input_ids": tokens, "labels": labels}


def _normal(like: Tensor, shape: tuple[int, ...], variance: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator, device=like.device)
    return drawn.mul_(variance**0.5).to(like.dtype)


def _cast(values: Values, dtype: torch.dtype) -> Values:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}


class Trainer(Protocol):
    """A provider made ready for one case. Names of values are those of `Problem.starts`."""

    def step(self) -> None:
        """Train every client one step: forward, backward, optimiser."""

    def gradients(self) -> list[Values]:
        """Return the gradients of every client at its present values, which do not change."""

    def values(self) -> list[Values]:
        """Return every client's present values."""
