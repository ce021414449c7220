"""Names of modules without `torch.compile`: a model may be compiled, in part too, after adapters were injected."""

from __future__ import annotations

from typing import Any

from torch import nn

COMPILED = "_orig_mod"  # the attribute in which torch.compile's wrapper holds its module


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module is the wrapper that `torch.compile(module)` returns."""
    return type(module).__name__ == "OptimizedModule" and COMPILED in module._modules


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside the wrapper that `torch.compile(module)` returns, or the module itself."""
    return model.get_submodule(COMPILED) if is_compiled(model) else model


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return every module's name in the model without `torch.compile`'s wrappers, by its name in the model.

    >>> plain_names(nn.Sequential(nn.ReLU()))
    {'': '', '0': '0'}
    """
    names: dict[str, str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in modules:
        parent, _, last = name.rpartition(".")
        if name and is_compiled(modules[parent]) and last == COMPILED:
            names[name] = names[parent]
        else:
            names[name] = f"{names[parent]}.{last}" if names.get(parent) else last
    return names


def with_plain_names(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a model's state dict with the keys that it has without `torch.compile`'s wrappers, in the same order."""
    names = plain_names(model)
    for key in list(state):  # all are taken out and put in again, so that their order stays
        owner, _, leaf = key.rpartition(".")
        plain = names.get(owner, owner)
        state[f"{plain}.{leaf}" if plain else leaf] = state.pop(key)
    return state
