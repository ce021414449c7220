"""Compiled training steps of cohorts, whose results are checked against plain steps before they are relied upon."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fed.training.losses import client_losses
from fed.training.memory import is_out_of_memory

# Allowed error of a compiled step's loss or gradient, relative to its norm, by its dtype. It is not zero because a
# compiled step adds in another order; in a float64 model some layers, such as Llama's norms, compute in float32.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-3}
BOUND_OF_HALF_PRECISION = 0.1
# The allowed relative error is at least this many eps of the model's coarsest dtype. In a bfloat16 model the loss is
# float32, but it is computed from logits rounded to bfloat16, and compiled layers round less often than plain ones. An
# error δ in a logit changes the loss by at most 2 δ relative to it; 12 eps allow a δ of 6 eps, which is three roundings
# of a logit of 4.
ROUNDINGS = 12
# A gradient is compared at no smaller a scale than this part of the norm of all the client's gradients, because a much
# smaller gradient consists of rounding errors.
NOTHING = 1e-3
# More than one step is compared, because in the first B is zero with most methods, so that the modules' output and dA
# are zero too and errors in them would not show.
COMPARED_STEPS = 3
# Limit on recompilations. Each number of clients in a cohort is compiled separately, and torch's default limit is 8.
SHAPES = 64

Gradients = Callable[[Tensor], Mapping[str, Tensor]]


class CompiledLosses:
    """`fed.training.losses.client_losses`, compiled by torch for each new shape of a cohort.

    After each compilation the losses and gradients of the next `COMPARED_STEPS` steps are compared with those of plain
    steps. If they differ, or torch cannot compile the step, a message goes to `on_event` and all further steps are
    plain. A model with dropout of its own draws other random numbers when compiled, so its steps cannot be compared;
    that is reported to `on_event` once.
    """

    def __init__(self, on_event: Callable[[str], object]) -> None:
        self._on_event = on_event
        self._losses: Callable[..., Tensor] = torch.compile(client_losses, backend=self._compile)
        self._has_compiled = False
        self._to_compare = 0
        self._has_drawn = False

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo import lookup_backend  # imported here because it takes a second

        self._has_compiled = True
        return lookup_backend("inductor")(graph, inputs)

    def __call__(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        sizes: Sequence[int],
        gradients: Gradients,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Return the clients' losses, as `client_losses` does.

        `gradients` must return the gradients of a loss, (C, …) by name, without parameters it does not depend on.
        """
        if self._losses is client_losses:
            return client_losses(model, batch, sizes, counted)
        device = batch["labels"].device
        before = _random_states(device)
        losses: Tensor | None = None
        try:
            losses = self._compiled(model, batch, sizes, counted)
            if not self._to_compare:
                return losses
            self._to_compare -= 1
            found = losses.detach().clone(), gradients(losses.sum())
        except Exception as error:
            losses = None  # frees its graph with the saved activations before the step is computed again
            if not self._is_compilers(error):
                raise
            self._give_up(f"torch cannot compile the cohort's step ({_first_line(error)})")
        else:
            losses = None
            self._compare(model, batch, sizes, gradients, *found, counted)
        _restore(before, device)
        return self._compiled(model, batch, sizes, counted)

    def _compiled(
        self, model: nn.Module, batch: dict[str, Tensor], sizes: Sequence[int], counted: Tensor | None
    ) -> Tensor:
        from torch._dynamo import config

        self._has_compiled = False
        with config.patch(recompile_limit=SHAPES), warnings.catch_warnings():
            # What torch says of itself: it looks at the gradients of what a compiled graph takes from a plain one.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            losses = self._losses(model, batch, sizes, counted)
        if self._has_compiled:
            self._to_compare = COMPARED_STEPS
        return losses

    def _is_compilers(self, error: Exception) -> bool:
        from torch._dynamo.exc import TorchDynamoException

        if is_out_of_memory(error):
            return False
        return self._has_compiled or isinstance(error, TorchDynamoException)

    def _compare(
        self, model: nn.Module, batch: dict[str, Tensor], sizes: Sequence[int], gradients: Gradients,
        losses: Tensor, found: Mapping[str, Tensor], counted: Tensor | None,
    ) -> None:  # fmt: skip
        device = batch["labels"].device
        before = _random_states(device)
        plain = client_losses(model, batch, sizes, counted)
        expected = gradients(plain.sum())
        if any(not torch.equal(one, other) for one, other in zip(before, _random_states(device), strict=True)):
            if not self._has_drawn:
                self._on_event("the model draws numbers (dropout of its own): compiled steps go unchecked")
            self._has_drawn = True
            return
        least = ROUNDINGS * _coarsest_eps(model)
        cause = _difference({"loss": losses}, {"loss": plain.detach()}, least) or _difference(found, expected, least)
        if cause is not None:
            self._give_up(f"the compiled step is wrong: {cause}")

    def _give_up(self, cause: str) -> None:
        self._on_event(f"{cause}; steps are taken uncompiled")
        self._losses = client_losses


def _coarsest_eps(model: nn.Module) -> float:
    """Return the largest eps of the dtypes a model computes in; dtypes below 16 bits are used for storage only."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize >= 2), default=0.0)


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], least: float = 0.0) -> str | None:
    """Return where tensors (C, …) of C clients differ by more than rounding, or None.

    A relative error of `least` is always allowed.
    """
    if found.keys() != expected.keys():
        return f"{', '.join(sorted(found.keys() ^ expected.keys()))} has a gradient in one of them alone"
    sizes = {name: _norms(own) for name, own in expected.items()}
    whole = torch.linalg.vector_norm(torch.stack(list(sizes.values())), dim=0).nan_to_num(0.0, 0.0)  # (C,)
    for name, own in expected.items():
        bound = max(BOUNDS.get(own.dtype, BOUND_OF_HALF_PRECISION), least)
        other, size = found[name], torch.maximum(sizes[name], NOTHING * whole)
        off = _norms(other.double() - own.double()) / size.clamp_min(torch.finfo(torch.float64).tiny)
        # Where the expected norm is not finite, because the client's training diverged, the other must not be either.
        wrong = torch.where(sizes[name].isfinite(), ~(off <= bound), _norms(other).isfinite())
        if wrong.any():
            client = int(wrong.nonzero()[0])
            return f"{name} of client {client} of the cohort is off by {float(off[client]):.1e} ({bound:g} is allowed)"
    return None


def _norms(stacked: Tensor) -> Tensor:
    """Return the norm of each client's part of (C, …), (C,) float64."""
    return torch.linalg.vector_norm(stacked.double().reshape(stacked.shape[0], -1), dim=1)


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the random generators that a model on `device` draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _first_line(error: Exception) -> str:
    inner = getattr(error, "inner_exception", error)  # torch wraps the error of the compiler backend
    return str(inner).strip().split("\n")[0] or type(inner).__name__
