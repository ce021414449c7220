"""Classification heads of several clients in one pass: every client's samples meet its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

import plora_kernels as pk


class StackedLinear(nn.Module):
    """y_c = x_c W_cᵀ + b_c for x (samples, …, K), of which client c owns `sizes[c]` samples, in order.

    weight (C, N, K) and bias (C, N) or None are the clients', differentiable.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__()
        # Plain attributes: as parameters they would no longer be the leaves the caller holds gradients of.
        self._operands, self._rows = (weight, bias), pk.RowGroups(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (samples, …, N)."""
        weight, bias = self._operands
        return self._rows.product(x, weight.mT, bias)


class OneByOne(nn.Module):
    """Any module, called once for each client with that client's parameters and samples.

    Every tensor argument whose leading axis counts the samples is cut; the module returns one tensor that starts with
    the samples as well.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor], sizes: Sequence[int]) -> None:
        super().__init__()
        self._module, self._stacks, self._sizes = (module,), dict(parameters), list(sizes)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Return the clients' outputs, one after the other."""
        samples, outputs, start = sum(self._sizes), [], 0
        for client, size in enumerate(self._sizes):
            rows = slice(start, start + size)
            own = {name: stack[client] for name, stack in self._stacks.items()}
            cut = [_own(value, rows, samples) for value in arguments]
            cut_named = {name: _own(value, rows, samples) for name, value in named.items()}
            outputs.append(torch.func.functional_call(self._module[0], own, tuple(cut), cut_named))
            start += size
        return torch.cat(outputs)


def _own(value: Any, rows: slice, samples: int) -> Any:
    is_cut = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples
    return value[rows] if is_cut else value


@contextmanager
def stacked_head(
    model: nn.Module, modules: Sequence[str], parameters: Mapping[str, Tensor], sizes: Sequence[int]
) -> Iterator[None]:
    """Let clients meet their own parameters, (C, …) by full name, in the named modules inside.

    Linear layers run batched; a module that holds parameters of another kind runs client by client.
    """
    replaced: dict[str, nn.Module] = {}
    try:
        for name in modules:
            for path, stand_in in _stand_ins(name, model.get_submodule(name), parameters, sizes):
                replaced[path] = model.get_submodule(path)
                model.set_submodule(path, stand_in)
        yield
    finally:
        for path, module in replaced.items():
            model.set_submodule(path, module)


def _stand_ins(
    name: str, module: nn.Module, parameters: Mapping[str, Tensor], sizes: Sequence[int]
) -> list[tuple[str, nn.Module]]:
    """Return what stands in for a module, or for the linear layers in it, by full name."""
    holders = [(path, part) for path, part in module.named_modules() if [*part.parameters(recurse=False)]]
    if any(type(part) is not nn.Linear for _, part in holders):
        own = {
            path.removeprefix(f"{name}."): stack for path, stack in parameters.items() if path.startswith(f"{name}.")
        }
        return [(name, OneByOne(module, own, sizes).train(module.training))]
    found: list[tuple[str, nn.Module]] = []
    for path, part in holders:
        full = f"{name}.{path}" if path else name
        bias = None if cast(nn.Linear, part).bias is None else parameters[f"{full}.bias"]
        found.append((full, StackedLinear(parameters[f"{full}.weight"], bias, sizes)))
    return found
