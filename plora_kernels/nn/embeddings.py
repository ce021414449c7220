"""Embeddings that an adapter has to bring along, because the vocabulary is not the base model's any more."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from plora_kernels.errors import ConfigError, TargetError

_VOCABULARIES = ("vocab_size", "src_vocab_size", "tgt_vocab_size")


def base_name(model: nn.Module) -> str | None:
    """Return the name or path a transformers model was loaded from, or None."""
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def embeddings_to_save(model: nn.Module, base: str | None, wanted: bool | str) -> list[nn.Module]:
    """Return the embeddings that belong into an adapter's file.

    With "auto" that is none, unless the sizes of the vocabulary in the model's configuration differ from those of its
    base, `base` or where the model was loaded from. Nothing is downloaded: the base's configuration is read from its
    folder or the local cache. With True they are the input and output embeddings.

    Raises:
        ConfigError: `wanted` is neither a bool nor "auto". TargetError: it is True and the model has no embeddings.
    """
    if wanted not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers is {wanted!r}; True, False or 'auto' is needed")
    if wanted is False:
        return []
    found = embeddings_of(model)
    if wanted == "auto":
        sizes = _changed_sizes(model, base) if found else set()
        if not sizes:
            return []
        held = {id(parameter) for module in found for parameter in module.parameters()}
        # An encoder and a decoder may each have embeddings of their own.
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings in sizes and id(module.weight) not in held:
                found.append(module)
                held.add(id(module.weight))
    elif not found:
        raise TargetError("save_embedding_layers is True, but the model has no get_input_embeddings that returns any")
    return found


def embeddings_of(model: nn.Module) -> list[nn.Module]:
    """Return the input and the output embeddings of a transformers model, as far as it has them."""
    found: list[nn.Module] = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, method, lambda: None)()
        except (NotImplementedError, AttributeError):  # transformers' answer for a model that has none
            continue
        if isinstance(module, nn.Module) and all(module is not other for other in found):
            found.append(module)
    return found


def _changed_sizes(model: nn.Module, base: str | None) -> set[int]:
    """Return the model's sizes of a vocabulary that are not its base's, after a warning if that cannot be known."""
    config: Any = getattr(model, "config", None)
    own = base_name(model)
    sizes = _sizes(config)
    names = [name for name in (base, own) if name]
    if not sizes or not names:
        return set()
    for name in names:
        try:
            before = _sizes(config.__class__.from_pretrained(name, local_files_only=True, trust_remote_code=False))
        except (OSError, ValueError, AttributeError):  # not a folder with a configuration, nor in the cache
            continue
        return {size for place, size in sizes.items() if before.get(place) != size}
    if own:
        warnings.warn(
            f"the configuration of {names[0]!r} cannot be read, so it is not known whether embeddings were resized, "
            "and they are not saved; pass save_embedding_layers=True if they were",
            stacklevel=4,
        )
    return set()


def _sizes(config: Any) -> dict[str, int]:
    """Return the sizes of vocabularies in a transformers configuration and the configurations inside it, by place."""
    if not hasattr(config, "to_dict"):
        return {}
    sizes: dict[str, int] = {}
    tables: list[tuple[str, Any]] = [("", config.to_dict())]
    while tables:
        place, table = tables.pop()
        for key, value in table.items():
            if key in _VOCABULARIES and isinstance(value, int):
                sizes[place + key] = value
            elif isinstance(value, dict):
                tables.append((f"{place}{key}.", value))
    return sizes
