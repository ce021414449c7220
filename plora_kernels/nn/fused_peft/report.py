"""`FusionReport`: which LoRA layers of a model are fused, which PEFT computes and why, and how often."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from plora_kernels.errors import StateError
from plora_kernels.nn.fused_peft.calls import FUSED


@dataclass(frozen=True)
class LayerStatus:
    """A LoRA layer at the moment: its name, PEFT's class of it, and why PEFT's forward computes it (None: fused).

    `calls` counts the calls so far, outside of torch.compile: key "fused", and the reasons for which PEFT's forward
    ran.
    """

    name: str
    kind: str
    reason: str | None
    calls: dict[str, int]

    @property
    def fused(self) -> bool:
        """Whether a plain call of the layer would be fused now."""
        return self.reason is None


class FusionReport:
    """What `fuse_peft` made of a model. It is read anew from the model at every use, and prints as a table.

    A fused layer may still hand single calls to PEFT's forward, for instance inside `disable_adapter()`: `calls` of its
    status says how many and why, and so do the last lines of the table.

    >>> from peft import LoraConfig, get_peft_model
    >>> from plora_kernels.nn.fused_peft.fuse import fuse_peft
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    >>> report = fuse_peft(model)
    >>> report.fused, report.layers[0].reason
    (1, None)
    >>> model.base_model.model[0].base_layer.requires_grad_(True).weight.requires_grad, report.layers[0].reason
    (True, "its base's weight is trained")
    """

    def __init__(self, model: nn.Module, read: Callable[[nn.Module], list[LayerStatus]]) -> None:
        """Take the model, which is not kept alive, and the function that reads its layers."""
        self._model, self._read = weakref.ref(model), read

    @property
    def layers(self) -> list[LayerStatus]:
        """The model's LoRA layers, in its order."""
        model = self._model()
        if model is None:
            raise StateError("the model of this report is gone; keep a reference to it, and call fuse_peft on it")
        return self._read(model)

    @property
    def fused(self) -> int:
        """How many layers are fused."""
        return sum(layer.fused for layer in self.layers)

    def __repr__(self) -> str:
        layers = self.layers
        return f"<FusionReport: {sum(layer.fused for layer in layers)} of {len(layers)} LoRA layers fused>"

    def __str__(self) -> str:
        layers = self.layers
        fused = sum(layer.fused for layer in layers)
        lines = [f"{fused} of {len(layers)} LoRA layers fused" + ("" if fused == len(layers) else "; PEFT the others")]
        called = any(layer.calls for layer in layers)
        head = ("layers", "count", "computed by", "why", *(("fused calls", "PEFT's calls") if called else ()))
        lines += _table(head, [_row(name, group, called) for name, group in _grouped(layers)])
        reasons = Counter[str]()
        for layer in layers:
            reasons.update({reason: times for reason, times in layer.calls.items() if reason != FUSED})
        lines += [f"{times:,} calls by PEFT's forward: {reason}" for reason, times in reasons.most_common()]
        return "\n".join(lines)


def _grouped(layers: Iterable[LayerStatus]) -> list[tuple[str, list[LayerStatus]]]:
    """Return layers that differ in the numbers in their names alone together, under the name with * for each number."""
    groups: dict[tuple[str, str | None], list[LayerStatus]] = {}
    for layer in layers:
        pattern = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
        groups.setdefault((pattern, layer.reason), []).append(layer)
    return [(group[0].name if len(group) == 1 else pattern, group) for (pattern, _), group in groups.items()]


def _row(name: str, group: Sequence[LayerStatus], called: bool) -> tuple[str, ...]:
    reason = group[0].reason
    row = (name or "(the model itself)", str(len(group)), "fused" if reason is None else "PEFT", reason or "")
    if not called:
        return row
    fused = sum(layer.calls.get(FUSED, 0) for layer in group)
    return *row, f"{fused:,}", f"{sum(sum(layer.calls.values()) for layer in group) - fused:,}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text in columns, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    right = [index in (1, 4, 5) for index in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        ).rstrip()
        for cells in itertools.chain([head], rows)
    ]
