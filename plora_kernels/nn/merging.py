"""Adapters added to the weights of a whole model: checked and computed before anything changes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from plora_kernels.errors import PLoRAWarning, StateError
from plora_kernels.nn.distributed import is_sharded
from plora_kernels.nn.layer_errors import naming
from plora_kernels.nn.linear import FusedPLoRALinear
from plora_kernels.nn.plain_names import with_plain_names
from plora_kernels.nn.storages import storage_of
from plora_kernels.nn.targets import shortened


def merged_weights(layers: Mapping[str, FusedPLoRALinear]) -> dict[str, Tensor]:
    """Return W + s·B A (N, K) of every layer, in new memory and in the weight's dtype; no layer is changed.

    W is the original weight, whatever is folded into it at the moment, and A and B are those of all modules.

    Raises:
        StateError: a weight is quantised, divided by `fully_shard` or was changed while modules were folded into it;
            or the layers run groups.
    """
    for name, layer in layers.items():
        with naming(name):
            if layer.groups is not None:
                raise StateError("its modules cannot be merged while it runs groups; leave `grouped` first")
            if any(is_sharded(parameter) for parameter in layer.parameters(recurse=False)):
                raise StateError("fully_shard has divided it: save the adapter, and merge it in a model that is whole")
            layer.check_unfoldable()
    weights = {}
    for name, layer in layers.items():
        with naming(name):
            weights[name] = layer.merged_weight()
    return weights


def merged_state_dict(model: nn.Module, layers: Mapping[str, FusedPLoRALinear]) -> dict[str, Any]:
    """Return the state dict that the plain model has with its adapters merged; the model is not changed.

    The merged weights are new tensors; all others are the model's own, as in `state_dict`.
    """
    weights = merged_weights(layers)
    by_layer = {id(layer): weights[name] for name, layer in layers.items()}
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in by_layer:
            state[f"{name}.weight"] = by_layer[id(module)]
            del state[f"{name}.lora_A"], state[f"{name}.lora_B"]
    return with_plain_names(state, model)


def tied_layers(model: nn.Module, layers: Mapping[str, FusedPLoRALinear]) -> list[str]:
    """Return the layers whose weight is another module's too, such as an adapted `lm_head` with tied embeddings."""
    users: dict[int, set[int]] = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            users.setdefault(storage_of(tensor), set()).add(id(module))
    return [name for name, layer in layers.items() if len(users[storage_of(layer.weight)]) > 1]


def keep_untied(model: nn.Module, tied: list[str]) -> None:
    """Make a transformers model whose tied layers have merged weights of their own one that is saved untied."""
    warn_of_untied(
        tied, "the model's config.tie_word_embeddings is False from now on", 3
    )  # past `keep_untied`, `merge` and its decorator
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    for each in (config, inner):
        if tied and getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False


def warn_of_untied(tied: list[str], advice: str, depth: int) -> None:
    """Say that merged weights are not those that the layers were tied to; `advice` ends the sentence.

    The warning is of the line `depth` functions further up than the caller's.
    """
    if tied:
        warnings.warn(
            f"the merged weight of {shortened(tied)} is no longer that of the module it was tied to; {advice}",
            PLoRAWarning,
            stacklevel=2 + depth,
        )
