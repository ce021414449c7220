"""Gradient checkpointing: layers save only their inputs, and the backward recomputes their activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fed.errors import FedError


@contextmanager
def recomputing(model: Any, on: bool) -> Iterator[None]:
    """Within the context, use gradient checkpointing when the model is in training mode; with `on` false do nothing.

    Raises FedError for a model that does not support it.
    """
    if not on:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise FedError(
            f"train.gradient_checkpointing is true: {type(model).__name__} has no layers that can recompute their "
            "activations; false would be right"
        )
    # Newer versions of transformers call gradient checkpointing activation checkpointing.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    # transformers may make the embeddings require gradients, which only the reentrant form needs. It is switched off,
    # because otherwise the first layer's dX would be computed for nothing.
    with suppress(AttributeError):  # raised by older versions, which do not switch it on
        model.disable_input_require_grads()
    # Training needs no cache of keys and values, and generation switches it on by itself.
    cached = getattr(model.config, "use_cache", None)
    if cached is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        getattr(model, f"{prefix}_checkpointing_disable")()
        if cached is not None:
            model.config.use_cache = cached
