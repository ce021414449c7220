"""One client after another on one model in memory, with the client's adapter, head and optimiser state swapped in.

The loop is the same with PEFT's layers and with this library's: nothing is copied to change clients, the model's
layers are pointed to the client's own parameters, and each client has an optimiser over those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import plora_kernels as pk
from bench.simulation.cases import ALPHA, RANK
from bench.simulation.models import sharing_weights
from bench.simulation.problem import Problem, Values, make_optimizer
from fed.data.tables import IGNORED
from fed.training.losses import client_losses

Loss = Callable[[nn.Module, Values], Tensor]
# The place of a value in the model: a module and the name of its parameter.
Slots = Mapping[str, tuple[nn.Module, str]]
FACTORS = ("lora_A", "lora_B")


class ResidentLoop:
    """Trains clients in turn on `model`, whose `slots` hold the parameters of the present client."""

    def __init__(self, model: nn.Module, slots: Slots, problem: Problem, loss: Loss) -> None:
        self.model, self.slots, self.batches, self.loss = model, slots, problem.batches, loss
        self.clients = [{name: nn.Parameter(start[name].clone()) for name in slots} for start in problem.starts]
        self.optimizers = [make_optimizer(list(client.values())) for client in self.clients]

    def step(self) -> None:
        for _, optimizer in self._backward_of_each():
            optimizer.step()

    def gradients(self) -> list[Values]:
        found = []
        for client, optimizer in self._backward_of_each():
            found.append({name: cast(Tensor, parameter.grad) for name, parameter in client.items()})
            optimizer.zero_grad()
        return found

    def values(self) -> list[Values]:
        return [{name: parameter.detach() for name, parameter in client.items()} for client in self.clients]

    def _backward_of_each(self) -> Iterator[tuple[dict[str, nn.Parameter], torch.optim.Optimizer]]:
        """Swap in one client after another, compute its gradients, and yield it with its optimiser."""
        for client, optimizer, batch in zip(self.clients, self.optimizers, self.batches, strict=True):
            for (module, attribute), parameter in zip(self.slots.values(), client.values(), strict=True):
                setattr(module, attribute, parameter)
            optimizer.zero_grad()
            self.loss(self.model, batch).backward()
            yield client, optimizer


def peft_model(problem: Problem) -> tuple[nn.Module, Slots]:
    """Return the model with PEFT's LoRA in it, adapters in the dtype of the values, and the places of these."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(problem.matrices),
        modules_to_save=problem.heads or None,
    )
    bare = sharing_weights(problem.model, problem.heads)
    wrapped = get_peft_model(bare, config, autocast_adapter_dtype=False)
    slots = {
        f"{matrix}.{factor}": (getattr(bare.get_submodule(matrix), factor)["default"], "weight")
        for matrix in problem.matrices
        for factor in FACTORS
    }
    for name in problem.heads:
        head: Any = bare.get_submodule(name)
        slots |= _head_slots(head.modules_to_save["default"], name)
    return wrapped, slots


def injected(problem: Problem) -> pk.Injected:
    """Return the model with this library's layers in it."""
    config = pk.PLoRAConfig(
        rank=RANK,
        alpha=ALPHA,
        target_modules=problem.matrices,
        modules_to_save=problem.heads,
        adapter_dtype=problem.starts[0][f"{problem.matrices[0]}.lora_A"].dtype,
    )
    return pk.inject(sharing_weights(problem.model, problem.heads), config)


def own_loss(model: nn.Module, batch: Values) -> Tensor:
    """Return the model's own mean loss."""
    loss: Tensor = model(**batch).loss
    return loss


def exact_loss(model: nn.Module, batch: Values) -> Tensor:
    """Return the same mean loss in the logits' dtype: transformers computes that of tokens in fp32 whatever it is."""
    if batch["labels"].dim() == 1:
        return own_loss(model, batch)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def simulator_loss(model: nn.Module, batch: Values) -> Tensor:
    """Return the same mean loss as the simulator computes it."""
    return client_losses(model, batch, [len(batch["labels"])]).sum()


def peft_loop(problem: Problem) -> ResidentLoop:
    """Return the loop over PEFT's layers; of a problem in float64, the reference, no part is computed in fp32."""
    exact = next(problem.model.parameters()).dtype == torch.float64
    return ResidentLoop(*peft_model(problem), problem, exact_loss if exact else own_loss)


def sequential(problem: Problem) -> ResidentLoop:
    """Return the loop over this library's layers: what a step of the simulator's sequential executor computes."""
    handle = injected(problem)
    slots: dict[str, tuple[nn.Module, str]] = {
        f"{matrix}.{factor}": (layer, factor) for matrix, layer in handle.layers.items() for factor in FACTORS
    }
    for name in problem.heads:
        slots |= _head_slots(handle.model.get_submodule(name), name)
    return ResidentLoop(handle.model, slots, problem, simulator_loss)


def _head_slots(module: nn.Module, head: str) -> dict[str, tuple[nn.Module, str]]:
    return {f"{head}.{name}": (module, name) for name, _ in module.named_parameters()}
