"""The classification head of a model: which modules it is, its precision, and drawing it anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fed.seeding import torch_seed

_CPU = torch.device("cpu")


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules of the classification head: all children with parameters except the backbone.

    A language model has none, because its output embeddings belong to the frozen base.
    """
    backbone = getattr(model, "base_model_prefix", "")
    output_embeddings = getattr(model, "get_output_embeddings", None)
    to_tokens = output_embeddings() if callable(output_embeddings) else None
    children = ((name, child) for name, child in model.named_children() if name != backbone and child is not to_tokens)
    return tuple(name for name, child in children if any(True for _ in child.parameters()))


def head_parameters(model: nn.Module) -> set[str]:
    """Return the names of all parameters of the classification head."""
    return {name for head in head_names(model) for name, _ in model.get_submodule(head).named_parameters(prefix=head)}


def hold_in_float32(model: nn.Module) -> None:
    """Convert a head in half precision to float32, and let it convert what the backbone hands it.

    In half precision most steps of AdamW would be lost, because they are smaller than the spacing of a weight's values.
    """
    for name in head_names(model):
        head = model.get_submodule(name)
        if any(value.is_floating_point() and value.dtype.itemsize < 4 for value in head.parameters()):
            head.float()
            head.register_forward_pre_hook(_with_its_dtype, with_kwargs=True)


def draw(model: Any, seed: int) -> None:
    """Initialise the whole head from the run's seed, as the model's class initialises a new one, on any device."""
    with torch_seed(_CPU, seed, "head"):
        for name in head_names(model):
            head = model.get_submodule(name)
            device = next(head.parameters()).device
            head.to(_CPU)
            # A module may initialise its children in another way than they would themselves, so it comes after them.
            for module in reversed([*head.modules()]):
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # transformers marks what it has loaded, and leaves it alone
                model._init_weights(module)
            head.to(device)


def _with_its_dtype(head: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Return a head's arguments with those of floating point in the dtype of its weights."""
    # There are no parameters while a cohort calls the head with those of its clients.
    dtype = next((value.dtype for value in head.parameters() if value.is_floating_point()), torch.float32)

    def converted(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(converted, arguments)), {name: converted(value) for name, value in named.items()}
