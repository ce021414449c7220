"""Compiled training steps, each held against a plain one when it is new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fed.losses import client_losses

# How much of their norm the gradients of a compiled step may be off: it adds up in another order, and in a model of
# float64 some layers compute in float32 all the same, as Llama's norms do.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-3}
BOUND_OF_HALF_PRECISION = 0.1


class CompiledLosses:
    """`fed.losses.client_losses`, compiled by torch for every new shape of a cohort.

    What has just been compiled is not taken on trust: at its first step the gradients are compared with those of a
    plain step. Where they differ, or where torch cannot compile, `on_event` gets a line and plain steps are taken from
    then on. A model that draws numbers (dropout of its own) draws others when compiled, and cannot be compared.
    """

    def __init__(self, on_event: Callable[[str], object]) -> None:
        self._on_event = on_event
        self._losses: Callable[..., Tensor] = torch.compile(client_losses, backend=self._compile)
        self._has_compiled = False

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo import lookup_backend  # takes a second to import

        self._has_compiled = True
        return lookup_backend("inductor")(graph, inputs)

    def __call__(
        self, model: nn.Module, batch: dict[str, Tensor], sizes: Sequence[int], gradients: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return what `client_losses` returns; `gradients` gives a loss's gradients, (P,), by all that trains."""
        if self._losses is client_losses:
            return client_losses(model, batch, sizes)
        device = batch["labels"].device
        before = _random_states(device)
        self._has_compiled = False
        try:
            losses = self._losses(model, batch, sizes)
            if not self._has_compiled:
                return losses
            found = gradients(losses.sum())
        except RuntimeError as error:
            if not self._has_compiled:
                raise
            self._give_up(f"torch cannot compile the cohort's step ({_first_line(error)})")
        else:
            del losses  # and what it keeps for a backward
            self._compare(model, batch, sizes, gradients, found)
        _restore(before, device)
        return self._losses(model, batch, sizes)

    def _compare(
        self, model: nn.Module, batch: dict[str, Tensor], sizes: Sequence[int],
        gradients: Callable[[Tensor], Tensor], found: Tensor,
    ) -> None:  # fmt: skip
        device = batch["labels"].device
        before = _random_states(device)
        expected = gradients(client_losses(model, batch, sizes).sum())
        if any(not torch.equal(one, other) for one, other in zip(before, _random_states(device), strict=True)):
            return  # it draws
        norm = torch.linalg.vector_norm(expected)
        off = float(torch.linalg.vector_norm(found - expected) / norm) if norm > 0 else 0.0
        bound = BOUNDS.get(expected.dtype, BOUND_OF_HALF_PRECISION)
        if off > bound:
            self._give_up(
                f"the gradients of the compiled step are off by {off:.1e} of their norm ({bound:g} is allowed)"
            )

    def _give_up(self, cause: str) -> None:
        self._on_event(f"{cause}; steps are taken uncompiled")
        self._losses = client_losses


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators a model on a device draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _first_line(error: Exception) -> str:
    inner = getattr(error, "inner_exception", error)  # torch wraps what the compiler says
    return str(inner).strip().split("\n")[0] or type(inner).__name__
