"""Classification heads of several clients in one forward: each client's samples go through its own head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

import plora_kernels as pk


class StackedLinear(nn.Module):
    """Linear layers of C clients, y_c = x_c W_cᵀ + b_c; client c owns `sizes[c]` consecutive samples of x.

    x is (samples, …, K), weight (C, N, K) and bias (C, N) or None; gradients flow to all three.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__()
        # Kept in a tuple, because wrapping them in nn.Parameter would make other leaves than the caller's.
        self._operands, self._rows = (weight, bias), pk.RowGroups(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (samples, …, N)."""
        weight, bias = self._operands
        return self._rows.product(x, weight.mT, bias)


class OneByOne(nn.Module):
    """A module that calls another one once for each client, with that client's parameters and samples.

    Every tensor argument whose first axis has the length of the batch is split by client. The called module must return
    one tensor whose first axis counts the samples.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor], sizes: Sequence[int]) -> None:
        super().__init__()
        self._module, self._stacks, self._sizes = (module,), dict(parameters), list(sizes)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Return the clients' outputs, concatenated along the first axis."""
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
    """Within the context, make the named modules use each client's own parameters, (C, …) by full name.

    Modules whose parameters all belong to linear layers run these layers for all clients at once; any other module runs
    client by client.
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
    """Return the replacements of a module, or of the linear layers in it, with their full names."""
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
