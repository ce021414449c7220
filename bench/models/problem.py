"""The inputs of every provider of a case: one frozen model, the adapter's values and a batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bench.models.cases import ModelCase
from bench.simulation.cases import RANK
from bench.simulation.models import build_model, layers_of

Values = dict[str, Tensor]
# The standard deviation of B, which is not zero: the gradient of A would be.
B_DEVIATION = 0.1 / RANK**0.5


@dataclass(frozen=True)
class Problem:
    """The tensors from which all providers of a case start.

    `matrices` are the adapted linears by name, `factors` holds `<matrix>.lora_A` (R, K) and `<matrix>.lora_B` (N, R) of
    each, `batch` the model's keyword arguments, rows first.
    """

    model: nn.Module
    matrices: tuple[str, ...]
    factors: Values
    batch: Values

    @property
    def has_transposed_weights(self) -> bool:
        """Whether the adapted linears are transformers' Conv1D, whose weight is (K, N)."""
        return isinstance(self.model.get_submodule(self.matrices[0]), Conv1D)

    def in_float64(self) -> Problem:
        """Return the same problem in float64, with a model of its own."""
        factors = {name: value.double() for name, value in self.factors.items()}
        return Problem(copy.deepcopy(self.model).double(), self.matrices, factors, self.batch)


def make_problem(case: ModelCase, device: torch.device, seed: int = 0) -> Problem:
    """Draw a case's tensors from a seed."""
    model = build_model(case.model, device, case.torch_dtype)
    matrices = adapted_names(model)
    generator = torch.Generator(device).manual_seed(seed + 1)
    dtype = torch.float32 if case.torch_dtype.itemsize == 2 else case.torch_dtype

    def drawn(deviation: float, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(deviation).to(dtype)

    factors = {}
    for matrix in matrices:
        k, n = sizes_of(model.get_submodule(matrix))
        factors[f"{matrix}.lora_A"] = drawn(k**-0.5, RANK, k)
        factors[f"{matrix}.lora_B"] = drawn(B_DEVIATION, n, RANK)
    rows = (case.batch, case.length)
    tokens = torch.randint(1, case.model.vocabulary, rows, generator=generator, device=device)
    labels = tokens  # of a language model; a classifier's are one a row
    if case.model.labels:
        labels = torch.randint(case.model.labels, (case.batch,), generator=generator, device=device)
    return Problem(model, matrices, factors, {"input_ids": tokens, "labels": labels})


def adapted_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the linears of attention and MLP: all of a transformer's layers, none outside of them."""
    inside = {id(module) for module in layers_of(model).modules()}
    return tuple(
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    )


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """Return K and N of a linear.

    >>> sizes_of(nn.Linear(3, 5)), sizes_of(Conv1D(5, 3))
    ((3, 5), (3, 5))
    """
    first, second = linear.get_parameter("weight").shape
    return (first, second) if isinstance(linear, Conv1D) else (second, first)
