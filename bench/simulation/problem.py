"""The inputs of every provider of a case, one frozen model and each client's values and batch, and its interface."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from bench.simulation.cases import ALPHA, PROMPT_SHARE, RANK, SHORTEST_SHARE, SimulationCase
from bench.simulation.models import HEADS, adapted_names, build_model
from fed.data.tables import IGNORED

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """The tensors from which all providers of a case start.

    `matrices` are the adapted linear layers by name and `head` the module that is trained in full, if there is one.
    `starts` holds for every client its `<matrix>.lora_A` (R, K), `<matrix>.lora_B` (N, R) and the head's parameters,
    `batches` the model's keyword arguments, the first dimension of each the client's rows.
    """

    model: nn.Module
    matrices: tuple[str, ...]
    head: str | None
    starts: tuple[Values, ...]
    batches: tuple[Values, ...]

    @property
    def scale(self) -> float:
        return ALPHA / RANK

    @property
    def heads(self) -> list[str]:
        """The modules that are trained in full: the head, or none."""
        return [] if self.head is None else [self.head]

    def padded(self) -> list[Values]:
        """Return the clients' batches, texts padded to the longest of all of them."""
        if "attention_mask" not in self.batches[0]:
            return list(self.batches)
        width = max(batch["input_ids"].shape[1] for batch in self.batches)
        return [
            {
                name: nn.functional.pad(value, (0, width - value.shape[1]), value=PADDING[name])
                for name, value in one.items()
            }
            for one in self.batches
        ]

    def joined(self) -> Values:
        """Return the cohort's batch: every client's rows, one client after the other."""
        batches = self.padded()
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

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
    starts = tuple(_start(case, model, matrices, head, generator) for _ in range(case.cohort))
    batches = tuple(_batch(case, device, generator) for _ in range(case.cohort))
    return Problem(model, matrices, head, starts, batches)


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser of all providers: AdamW in torch's fused form."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def _start(
    case: SimulationCase, model: nn.Module, matrices: tuple[str, ...], head: str | None, generator: torch.Generator
) -> Values:
    values, dtype = {}, case.factor_dtype
    for matrix in matrices:
        weight = model.get_parameter(f"{matrix}.weight")
        n, k = weight.shape
        values[f"{matrix}.lora_A"] = _normal(weight, (RANK, k), 1 / k, generator, dtype)
        values[f"{matrix}.lora_B"] = _normal(weight, (n, RANK), 1 / (100 * RANK), generator, dtype)
    if head is not None:
        for name, parameter in model.get_submodule(head).named_parameters():
            drawn = _normal(parameter, tuple(parameter.shape), 1e-4, generator, parameter.dtype)
            values[f"{head}.{name}"] = parameter + drawn
    return values


def _batch(case: SimulationCase, device: torch.device, generator: torch.Generator) -> Values:
    """Return rows of one length, so that no provider needs an attention mask, but for texts of unequal length.

    A language model's labels are the tokens after the prompt.
    """
    if case.is_language_model:
        return _texts(case, device, generator)
    labels = torch.randint(case.model.labels, (case.batch,), generator=generator, device=device)
    if case.model.family == "vit":
        images = torch.randn(case.batch, 1, 8, 8, generator=generator, device=device)
        return {"pixel_values": images.to(case.torch_dtype), "labels": labels}
    rows = (case.batch, case.length)
    tokens = torch.randint(1, case.model.vocabulary, rows, generator=generator, device=device)
    return {"input_ids": tokens, "labels": labels}


def _texts(case: SimulationCase, device: torch.device, generator: torch.Generator) -> Values:
    """Return a language model's rows (b, L); those of unequal length are padded on the right to the longest."""
    lengths = torch.full((case.batch, 1), case.length, device=device)
    if case.unequal:
        shortest = int(case.length * SHORTEST_SHARE)
        lengths = torch.randint(shortest, case.length + 1, (case.batch, 1), generator=generator, device=device)
    columns = torch.arange(int(lengths.max()), device=device)
    inside, prompts = columns < lengths, (lengths * PROMPT_SHARE).long()
    tokens = torch.randint(1, case.model.vocabulary, inside.shape, generator=generator, device=device)
    tokens = torch.where(inside, tokens, PADDING["input_ids"])
    batch = {"input_ids": tokens, "labels": torch.where(inside & (columns >= prompts), tokens, IGNORED)}
    return batch | {"attention_mask": inside.long()} if case.unequal else batch


def _normal(
    like: Tensor, shape: tuple[int, ...], variance: float, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    drawn = torch.randn(shape, generator=generator, device=like.device)
    return drawn.mul_(variance**0.5).to(dtype)


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
