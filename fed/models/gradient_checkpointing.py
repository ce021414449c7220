"""Gradient checkpointing: layers keep their inputs alone, and the backward computes their activations again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fed.errors import FedError


@contextmanager
def recomputing(model: Any, on: bool) -> Iterator[None]:
    """Have the model's layers recompute in training mode for as long as the body runs; with `on` false do nothing.

    Raises FedError for a model whose layers cannot.
    """
    if not on:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise FedError(
            f"train.gradient_checkpointing is true: {type(model).__name__} has no layers that can recompute their "
            "activations; false would be right"
        )
    # From some version of transformers on gradient checkpointing goes by the name of activation checkpointing.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    # Only the reentrant form needs embeddings with a gradient; here that would cost the first layer's dX.
    with suppress(AttributeError):  # older versions ask for none, and have none to take back
        model.disable_input_require_grads()
    # A cache of keys and values is for generation, which says itself that it wants one.
    cached = getattr(model.config, "use_cache", None)
    if cached is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        getattr(model, f"{prefix}_checkpointing_disable")()
        if cached is not None:
            model.config.use_cache = cached
