"""The providers that are measured, all from the same values on the same batch with the same optimiser.

*base* is the bare model, forward and backward to the output of its embeddings: it computes the same gradients of
activations as the others, and trains nothing. *peft* is PEFT's model, *fuse-peft* the same after `fuse_peft`, *inject*
the bare model with this library's layers. Each has a compiled form, the whole model through `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import plora_kernels as pk
from bench.models.cases import ModelCase
from bench.models.problem import Problem, Values
from bench.providers.base import ProviderUnavailableError
from bench.simulation.cases import ALPHA, RANK
from bench.simulation.models import sharing_weights
from bench.simulation.problem import make_optimizer
from bench.simulation.resident import FACTORS, exact_loss, own_loss

EAGER = ("base", "peft", "fuse-peft", "inject")
COMPILED = "-compiled"
PROVIDERS = (*EAGER, *(f"{name}{COMPILED}" for name in EAGER))


class Runner(Protocol):
    """A provider made ready for one case."""

    def step(self) -> None:
        """Compute one training step."""

    def results(self) -> Values:
        """Return the loss and the gradients at the present values, which do not change."""


class Bare:
    """The model alone. Its results are the loss and the gradient of the embeddings' output (rows, length, width)."""

    def __init__(self, problem: Problem, *, compiled: bool) -> None:
        model: Any = sharing_weights(problem.model, ())
        self.embed = model.get_input_embeddings()
        self.call, self.loss = _called(model, compiled), _loss_of(problem)
        self.tokens, self.labels = problem.batch["input_ids"], problem.batch["labels"]

    def step(self) -> None:
        self._backward()

    def results(self) -> Values:
        loss, entered = self._backward()
        return {"loss": loss.detach()} | ({} if entered.grad is None else {"embeddings": entered.grad})

    def _backward(self) -> tuple[Tensor, Tensor]:
        entered: Tensor = self.embed(self.tokens).detach().requires_grad_()
        loss = self.loss(self.call, {"inputs_embeds": entered, "labels": self.labels})
        loss.backward()
        return loss, entered


class Adapted:
    """A model with an adapter, whose factors by name are trained. Its results are the loss and their gradients."""

    def __init__(
        self, model: nn.Module, factors: Mapping[str, nn.Parameter], problem: Problem, *, compiled: bool
    ) -> None:
        self.factors, self.batch = factors, problem.batch
        with torch.no_grad():
            for name, factor in factors.items():
                factor.copy_(problem.factors[name])
        self.call, self.loss = _called(model, compiled), _loss_of(problem)
        self.optimizer = make_optimizer(list(factors.values()))

    def step(self) -> None:
        self._backward()
        self.optimizer.step()

    def results(self) -> Values:
        loss = self._backward()
        gradients = {name: factor.grad for name, factor in self.factors.items() if factor.grad is not None}
        self.optimizer.zero_grad()
        return {"loss": loss.detach(), **gradients}

    def _backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.call, self.batch)
        loss.backward()
        return loss


def _peft(problem: Problem, *, compiled: bool, fused: bool = False) -> Adapted:
    """PEFT's model as it is by default, over half precision with an adapter in fp32; `fused`: after `fuse_peft`."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(problem.matrices),
        fan_in_fan_out=problem.has_transposed_weights,
    )
    bare = sharing_weights(problem.model, ())
    wrapped = get_peft_model(bare, config)
    if fused:
        report = pk.fuse_peft(wrapped)
        if report.fused < len(problem.matrices):
            raise ProviderUnavailableError(next(layer.reason for layer in report.layers if layer.reason is not None))
    factors = {
        f"{matrix}.{factor}": getattr(bare.get_submodule(matrix), factor)["default"].weight
        for matrix in problem.matrices
        for factor in FACTORS
    }
    return Adapted(wrapped, factors, problem, compiled=compiled)


def _fuse_peft(problem: Problem, *, compiled: bool) -> Adapted:
    return _peft(problem, compiled=compiled, fused=True)


def _inject(problem: Problem, *, compiled: bool) -> Adapted:
    config = pk.PLoRAConfig(rank=RANK, alpha=ALPHA, target_modules=list(problem.matrices))
    try:
        handle = pk.inject(sharing_weights(problem.model, ()), config)
    except pk.TargetError as error:  # a linear that it does not take
        raise ProviderUnavailableError(str(error)) from error
    factors = {
        f"{matrix}.{factor}": getattr(layer, factor) for matrix, layer in handle.layers.items() for factor in FACTORS
    }
    return Adapted(handle.model, factors, problem, compiled=compiled)


RUNNERS: dict[str, Callable[..., Runner]] = {"base": Bare, "peft": _peft, "fuse-peft": _fuse_peft, "inject": _inject}


def providers_of(case: ModelCase) -> tuple[str, ...]:
    """Return the providers of a case."""
    return PROVIDERS if case.compiled else EAGER


def make_runner(name: str, problem: Problem) -> Runner:
    """Build a provider for a case; raises ProviderUnavailableError if it does not take this model."""
    return RUNNERS[name.removesuffix(COMPILED)](problem, compiled=is_compiled(name))


def is_compiled(name: str) -> bool:
    return name.endswith(COMPILED)


def _called(model: nn.Module, compiled: bool) -> Any:
    return torch.compile(model, fullgraph=True) if compiled else model


def _loss_of(problem: Problem) -> Callable[[Any, Values], Tensor]:
    """Return the model's own mean loss; in float64 the same without the parts that transformers computes in fp32."""
    exact = next(problem.model.parameters()).dtype == torch.float64
    return exact_loss if exact else own_loss
