"""Folders with an adapter that PEFT saved, changed in one of its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.architectures import stir

PREFIX = "base_model.model."
INPUTS = torch.linspace(-1, 1, 24).view(3, 8)


class Block(nn.Module):
    """A linear layer and a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x))


class Small(nn.Module):
    """Three blocks between a projection and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def saved_by_peft(directory: Path, build: Callable[[], nn.Module] = Small, **options: Any) -> Path:
    """Save an adapter of rank 4 and α 8 with random values, and return its directory."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["proj", "lin"], **options}
    start = options.pop("init_lora_weights", True)
    model = get_peft_model(build(), LoraConfig(init_lora_weights=start, **options))
    stir(model).save_pretrained(directory)
    return directory


def change_config(directory: Path, **fields: object) -> Path:
    """Set fields of the saved configuration."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    """Replace the saved tensors by what `change` returns for them."""
    path = directory / "adapter_model.safetensors"
    changed = change(load_file(path))
    save_file({name: value.clone() for name, value in changed.items()}, path)
    return directory


def snapshot(model: nn.Module) -> list[object]:
    """Return what a refused operation must leave as it was: modules, their modes, parameters, flags and values."""
    modules = [(name, module, module.training) for name, module in model.named_modules(remove_duplicate=False)]
    parameters = model.named_parameters(remove_duplicate=False)
    flags = [(name, id(parameter), parameter.requires_grad) for name, parameter in parameters]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return [modules, flags, values]


def assert_unchanged(model: nn.Module, before: list[object]) -> None:
    """Assert that the model is what the snapshot was taken of."""
    modules, flags, values = snapshot(model)
    assert (modules, flags) == (before[0], before[1])
    assert values.keys() == before[2].keys()
    assert all(torch.equal(value, before[2][name]) for name, value in values.items())
