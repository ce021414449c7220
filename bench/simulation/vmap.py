"""All clients at once by `torch.func`: gradients of a functional call of PEFT's model, mapped over stacked adapters."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bench.simulation.problem import Problem, Values, make_optimizer
from bench.simulation.resident import peft_model


class StackedTrainer:
    """Trains a cohort by vmap; a client's values are row c of the stacked parameters, as is its optimiser state."""

    def __init__(self, problem: Problem) -> None:
        self.model, slots = peft_model(problem)
        full = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.names = {name: full[id(getattr(*slot))] for name, slot in slots.items()}
        self.stacked = {name: nn.Parameter(torch.stack([start[name] for start in problem.starts])) for name in slots}
        batches = problem.padded()
        self.batch = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
        self.optimizer = make_optimizer(list(self.stacked.values()))
        self.mapped = vmap(grad(self._loss))

    def step(self) -> None:
        for name, gradient in self._gradients().items():
            self.stacked[name].grad = gradient
        self.optimizer.step()

    def gradients(self) -> list[Values]:
        return _rows(self._gradients())

    def values(self) -> list[Values]:
        return _rows({name: parameter.detach() for name, parameter in self.stacked.items()})

    def _loss(self, values: Values, batch: Values) -> Tensor:
        parameters = {self.names[name]: value for name, value in values.items()}
        return functional_call(self.model, parameters, args=(), kwargs=batch).loss

    def _gradients(self) -> Values:
        with warnings.catch_warnings():
            # An operator without a batching rule, attention for one, runs client by client and warns at every call.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found: Values = self.mapped({name: value.detach() for name, value in self.stacked.items()}, self.batch)
        return found


def _rows(stacked: Values) -> list[Values]:
    clients = len(next(iter(stacked.values())))
    return [{name: value[client] for name, value in stacked.items()} for client in range(clients)]
