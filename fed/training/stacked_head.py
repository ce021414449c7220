"""Classification heads of several clients in one forward: each client's samples go through its own head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

import plora_kernels as pk


class HeadRows:
    """How many consecutive samples of the batch each client owns, which the heads of a model share."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.groups = list(sizes), pk.RowGroups(sizes)

    @contextmanager
    def of(self, sizes: Sequence[int]) -> Iterator[None]:
        """Within the context, the batch has other numbers of samples."""
        before = self.sizes, self.groups
        self.sizes, self.groups = list(sizes), pk.RowGroups(sizes)
        try:
            yield
        finally:
            self.sizes, self.groups = before


class StackedLinear(nn.Module):
    """Linear layers of C clients, y_c = x_c W_cᵀ + b_c; client c owns `rows.sizes[c]` consecutive samples of x.

    x is (samples, …, K), weight (C, N, K) and bias (C, N) or None; gradients flow to all three.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: HeadRows) -> None:
        super().__init__()
        # Kept in a tuple, because wrapping them in nn.Parameter would make other leaves than the caller's.
        self._operands, self._rows = (weight, bias), rows

    def forward(self, x: Tensor) -> Tensor:
        """Return y (samples, …, N)."""
        weight, bias = self._operands
        # A head in fp32 may stand over half precision.
        return self._rows.groups.product(x.to(weight.dtype), weight.mT, bias)


class OneByOne(nn.Module):
    """A module that calls another one once for each client, with that client's parameters and samples.

    Every tensor argument whose first axis has the length of the batch is split by client. The called module must return
    one tensor whose first axis counts the samples.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor], rows: HeadRows) -> None:
        super().__init__()
        self._module, self._stacks, self._rows = (module,), dict(parameters), rows

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Return the clients' outputs, concatenated along the first axis."""
        samples, outputs, start = sum(self._rows.sizes), [], 0
        for client, size in enumerate(self._rows.sizes):
            if size == 0:  # a part of a batch may lack some clients
                continue
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
    model: nn.Module, modules: Sequence[str], parameters: Mapping[str, Tensor], rows: HeadRows
) -> Iterator[None]:
    """Within the context, make the named modules use each client's own parameters, (C, …) by full name.

    Modules whose parameters all belong to linear layers run these layers for all clients at once; any other module runs
    client by client.
    """
    replaced: dict[str, nn.Module] = {}
    try:
        for name in modules:
            for path, stand_in in _stand_ins(name, model.get_submodule(name), parameters, rows):
                replaced[path] = model.get_submodule(path)
                model.set_submodule(path, stand_in)
        yield
    finally:
        for path, module in replaced.items():
            model.set_submodule(path, module)


def _stand_ins(
    name: str, module: nn.Module, parameters: Mapping[str, Tensor], rows: HeadRows
) -> list[tuple[str, nn.Module]]:
    """Return the replacements of a module, or of the linear layers in it, with their full names."""
    holders = [(path, part) for path, part in module.named_modules() if [*part.parameters(recurse=False)]]
    if any(type(part) is not nn.Linear for _, part in holders):
        own = {
            path.removeprefix(f"{name}."): stack for path, stack in parameters.items() if path.startswith(f"{name}.")
        }
        return [(name, OneByOne(module, own, rows).train(module.training))]
    found: list[tuple[str, nn.Module]] = []
    for path, part in holders:
        full = f"{name}.{path}" if path else name
        bias = None if cast(nn.Linear, part).bias is None else parameters[f"{full}.bias"]
        found.append((full, StackedLinear(parameters[f"{full}.weight"], bias, rows)))
    return found
