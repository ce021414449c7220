"""The trained parameters of several clients in one contiguous tensor, and an optimiser over it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fed.errors import FedError

if TYPE_CHECKING:
    from fed.config.training import TrainConfig


class Stacked:
    """Named parameters (C, …) of C clients in one flat tensor, `values`, and their `gradients` in a second one.

    Both are laid out name by name and, within a name, client by client. The parameters of the first c clients under one
    name are thus contiguous, which makes batched products fastest; and while all clients train, all parameters are one
    contiguous piece, which makes the optimiser fastest.
    """

    def __init__(self, tensors: Mapping[str, Tensor], columns: Collection[str] = ()) -> None:
        """Copy `tensors`, each (C, …), storing the matrices named in `columns` column by column.

        Raises FedError unless all have one dtype and device.
        """
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
        if len(kinds) > 1:
            raise FedError(
                f"the trained parameters are {', '.join(sorted(map(str, kinds)))}; a cohort needs them of one dtype "
                "and on one device; execution = 'sequential' takes them as they are"
            )
        self.clients = len(next(iter(tensors.values())))
        self._shapes = {name: tensor.shape[1:] for name, tensor in tensors.items()}
        self._columns = frozenset(columns)
        first = next(iter(tensors.values()))
        self.values = torch.empty(sum(map(Tensor.numel, tensors.values())), dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.values)
        for place, tensor in zip(self.named(self.values).values(), tensors.values(), strict=True):
            place.copy_(tensor.detach())

    def named(self, memory: Tensor) -> dict[str, Tensor]:
        """Return views (C, …) by name of the parts of a flat tensor laid out as `values`."""
        parts = memory.split([self.clients * prod(shape) for shape in self._shapes.values()])
        return {name: self._view(name, part) for name, part in zip(self._shapes, parts, strict=True)}

    def _view(self, name: str, part: Tensor) -> Tensor:
        shape = self._shapes[name]
        if name in self._columns:
            rows, columns = shape
            return part.view(self.clients, columns, rows).mT
        return part.view(self.clients, *shape)

    def leaves(self, count: int) -> dict[str, Tensor]:
        """Return the first `count` clients' parameters, (count, …) by name, as leaves that require gradients."""
        return {name: own[:count].requires_grad_() for name, own in self.named(self.values.detach()).items()}

    def clip_(self, count: int, max_norm: float) -> None:
        """Clip the gradient norm of each of the first `count` clients to `max_norm`, as torch's `clip_grad_norm_`."""
        gradients = [own[:count] for own in self.named(self.gradients).values()]
        norms = torch.stack([torch.linalg.vector_norm(own.flatten(1), dim=1) for own in gradients])
        factors = (max_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp_(max=1.0)
        for own in gradients:
            own.mul_(factors.view(-1, *[1] * (own.dim() - 1)))

    def pieces(self, count: int, rates: Sequence[float]) -> list[Piece]:
        """Return the fewest contiguous pieces of `values` that cover the first `count` clients, one rate per piece."""
        if count == self.clients and len(set(rates)) == 1:
            return [Piece(0, len(self.values), rates[0])]
        found, start = [], 0
        for shape in self._shapes.values():
            size, client = prod(shape), 0
            for rate, same in itertools.groupby(rates[:count]):
                many = len(list(same))
                found.append(Piece(start + client * size, start + (client + many) * size, rate))
                client += many
            start += self.clients * size
        return found


class Piece(NamedTuple):
    """Elements start … stop−1 of a flat tensor, whose clients share the learning rate `rate`."""

    start: int
    stop: int
    rate: float


class StackedOptimizer:
    """torch's AdamW or SGD over the values of a `Stacked`, with a learning rate and state for each client.

    Weight decay applies only where the bool mask `trained`, laid out as `values`, is True; None stands for everywhere.
    """

    def __init__(
        self, stacked: Stacked, settings: TrainConfig, learning_rates: Sequence[float], trained: Tensor | None
    ) -> None:
        self._stacked, self._settings, self._rates = stacked, settings, list(learning_rates)
        self._decay: Tensor | None = None
        if trained is not None and settings.weight_decay:  # torch's optimisers take no mask: `step` applies the decay
            decay = trained.to(stacked.values.dtype) * settings.weight_decay
            if settings.optimizer == "adamw":
                rates = torch.tensor(learning_rates, dtype=decay.dtype, device=decay.device)
                for own in stacked.named(decay).values():
                    own.mul_(rates.view(-1, *[1] * (own.dim() - 1)))
            self._decay = decay
        self._count, self._pieces = 0, list[Piece]()
        self._torch: torch.optim.Optimizer | None = None

    @torch.no_grad()
    def step(self, count: int) -> None:
        """Take one step for the first `count` clients; `count` must never grow from one call to the next."""
        if self._torch is None or count != self._count:
            self._torch = self._with(count)
        if self._decay is not None:
            if self._settings.optimizer == "adamw":
                self._stacked.values.addcmul_(self._stacked.values, self._decay, value=-1)
            else:
                self._stacked.gradients.addcmul_(self._stacked.values, self._decay)
        self._torch.step()

    def _with(self, count: int) -> torch.optim.Optimizer:
        """Return an optimiser of the first `count` clients that continues from the current one's state."""
        pieces = self._stacked.pieces(count, self._rates)
        groups = [
            {"params": [self._parameter(piece) for piece in pieces if piece.rate == rate], "lr": rate}
            for rate in dict.fromkeys(piece.rate for piece in pieces)
        ]
        settings, decay = self._settings, 0.0 if self._decay is not None else self._settings.weight_decay
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, weight_decay=decay, fused=True)
            if settings.optimizer == "adamw"
            else torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=decay, fused=True)
        )
        if self._torch is not None:
            self._hand_on(self._torch, optimizer)
        if self._decay is not None:
            for own in self._stacked.named(self._decay).values():
                own[count:].zero_()
        self._count = count
        return optimizer

    def _parameter(self, piece: Piece) -> Tensor:
        parameter = self._stacked.values[piece.start : piece.stop].requires_grad_()
        parameter.grad = self._stacked.gradients[piece.start : piece.stop]
        return parameter

    def _hand_on(self, before: torch.optim.Optimizer, after: torch.optim.Optimizer) -> None:
        """Copy the state of the optimiser `before` to `after`, which may divide `values` into other pieces."""
        whole: dict[str, Tensor] = {}
        for parameter in _parameters(before):
            for key, value in before.state[parameter].items():
                if key == "step":  # equal for all pieces, because all clients began together
                    whole[key] = value
                    continue
                if key not in whole:
                    whole[key] = torch.zeros_like(self._stacked.values)
                start = parameter.storage_offset()
                whole[key][start : start + len(parameter)] = value
        for parameter in _parameters(after):
            own = slice(parameter.storage_offset(), parameter.storage_offset() + len(parameter))
            after.state[parameter] = {
                key: value.clone() if key == "step" else value[own] for key, value in whole.items()
            }


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
