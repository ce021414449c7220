"""The trained numbers of several clients in one tensor, a row for each, and views of it as the model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fed.errors import FedError

if TYPE_CHECKING:
    from fed.training_config import TrainConfig


class Stacked:
    """Named tensors (C, …) of C clients held side by side in `values` (C, P), with their gradients.

    A client's row is one contiguous parameter, so that torch's own optimiser keeps state, learning rate and step count
    for each client and moves it in one call; what the model reads are strided views, (c, …) of the first c clients.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors`, each (C, …), all of one dtype and device."""
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
        if len(kinds) > 1:
            raise FedError(
                f"the trained parameters are {', '.join(sorted(map(str, kinds)))}; a cohort needs them of one dtype "
                "and on one device; execution = 'sequential' takes them as they are"
            )
        self._shapes = {name: tensor.shape[1:] for name, tensor in tensors.items()}
        self.values = torch.cat([tensor.detach().flatten(1) for tensor in tensors.values()], dim=1)
        self.gradients = torch.zeros_like(self.values)
        self.rows = [nn.Parameter(row) for row in self.values]

    def __len__(self) -> int:
        return len(self.values)

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """Return the named views (…, *shape) of values, gradients or a mask (…, P)."""
        parts = row.split([prod(shape) for shape in self._shapes.values()], dim=-1)
        return {
            name: part.unflatten(-1, shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def leaves(self, count: int) -> dict[str, Tensor]:
        """Return the first `count` clients' tensors, (count, …), as leaves to differentiate by.

        The other clients' rows have no gradient from here on, which is how an optimiser is told to leave them alone.
        """
        for client, row in enumerate(self.rows):
            row.grad = self.gradients[client] if client < count else None
        return {name: view.requires_grad_() for name, view in self.split(self.values[:count].detach()).items()}

    def differentiate(self, loss: Tensor, leaves: Mapping[str, Tensor]) -> list[str]:
        """Write the loss's gradient by the leaves into `gradients`; return the names it does not depend on.

        Their gradient is zero. Not `backward`: leaves that are strided views would each take a copy to add to.
        """
        count = next(iter(leaves.values())).shape[0]
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        places = self.split(self.gradients[:count])
        known = {name: gradient for name, gradient in zip(places, found, strict=True) if gradient is not None}
        torch._foreach_copy_([places[name] for name in known], list(known.values()))
        unused = [name for name in places if name not in known]
        for name in unused:
            places[name].zero_()
        return unused

    def clip_(self, count: int, max_norm: float) -> None:
        """Scale each of the first `count` clients' gradients down to a norm of `max_norm`, as torch's clipping does."""
        gradients = self.gradients[:count]
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        gradients.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))


class StackedOptimizer:
    """torch's AdamW or SGD over the rows of `Stacked`, each client with its own learning rate.

    Weight decay touches only what a client trains, `trained` (C, P) bool; None: everything.
    """

    def __init__(
        self, stacked: Stacked, settings: TrainConfig, learning_rates: Sequence[float], trained: Tensor | None
    ) -> None:
        self._stacked, self._adamw, decay = stacked, settings.optimizer == "adamw", settings.weight_decay
        self._decay: Tensor | None = None
        if trained is not None and decay:  # the optimiser knows of no masks
            rates = torch.tensor(learning_rates, dtype=stacked.values.dtype, device=stacked.values.device)[:, None]
            self._decay = trained.to(stacked.values.dtype) * (decay * rates if self._adamw else decay)
            decay = 0.0
        groups = [
            {"params": [row for row, own in zip(stacked.rows, learning_rates, strict=True) if own == rate], "lr": rate}
            for rate in dict.fromkeys(learning_rates)
        ]
        self.torch: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, weight_decay=decay, fused=True)
            if self._adamw
            else torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=decay, fused=True)
        )

    @torch.no_grad()
    def step(self, count: int) -> None:
        """Move the first `count` clients."""
        if self._decay is not None:
            values, decay = self._stacked.values[:count], self._decay[:count]
            if self._adamw:
                values.addcmul_(values, decay, value=-1)
            else:
                self._stacked.gradients[:count].addcmul_(values, decay)
        self.torch.step()
