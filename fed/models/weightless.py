"""The model that all clients share, with its adapter and without values: for costs that follow from shapes alone.

A model of any size takes no memory so. Only its `config.json` is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import plora_kernels as pk
from fed.config import RunConfig
from fed.data.pretrained import checkpoint_of, failing_as, load_architecture, quiet, require_positions
from fed.models import base_model
from fed.models.checkpoint import Form, saved_dtype
from fed.models.gradient_checkpointing import recomputing
from fed.models.head import head_names, hold_in_float32
from fed.models.shared_model import SharedModel, adapter_settings, shared_with

_CPU = torch.device("cpu")


def outline(config: RunConfig, labels: int | None = None) -> nn.Module:
    """Return the base model of a run on the meta device, in the dtype that it has in the run.

    It is the embedded ViT, or what the `config.json` in `model.path` describes: a causal language model for
    instructions, else a classifier of `labels` labels (None: as many as `config.json` names). A quantised base has the
    dtype that it computes in. Raises FedError if there is no such checkpoint or it has fewer positions than
    `data.max_length`.
    """
    if config.model.path is None:
        with torch.device("meta"):
            model: nn.Module = base_model.embedded_vit(config, [str(number) for number in range(labels or 10)])
            base_model.convert(model, config)
        return model
    path = checkpoint_of(config)
    require_positions(config)
    import transformers

    with quiet(), failing_as(f"model.path is {str(path)!r}: its config.json makes no model"):
        architecture = load_architecture(path)
        form = Form(config.model.dtype, "none", config.model.attention, _CPU)
        options: dict[str, Any] = {} if form.attention == "auto" else {"attn_implementation": form.attention}
        kind: Any = transformers.AutoModelForCausalLM
        if config.data.task == "classification":
            kind = transformers.AutoModelForSequenceClassification
            if labels is not None:
                architecture.num_labels = labels
        with torch.device("meta"):
            model = kind.from_config(architecture, trust_remote_code=False, **options)
        model.to(saved_dtype(path, architecture, form))
        hold_in_float32(model)
    return model


@contextmanager
def weightless(config: RunConfig, labels: int | None = None) -> Iterator[SharedModel]:
    """Within the context, the run's shared model consists of tensors of the CPU that have shapes and no memory.

    Every tensor that is made within the context is such a tensor, and reading its value raises an error. Raises what
    `outline` does, and PLoRAError if the adapter does not fit the model.
    """
    model = outline(config, labels)
    handle = pk.inject(model, adapter_settings(config, head_names(model)))
    # Operators take the shapes of the CPU's, not of the meta device, whose attention keeps other tensors.
    with FakeTensorMode(allow_non_fake_inputs=True), recomputing(model, config.train.gradient_checkpointing):
        _replace_tensors(model)
        yield shared_with(handle, model, _CPU)


def _replace_tensors(model: nn.Module) -> None:
    """Replace parameters and buffers by empty ones of the same shapes, those that modules share by one."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is None:
                    continue
                if id(value) not in made:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                    trained = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(empty, value.requires_grad) if trained else empty
                held[name] = made[id(value)]  # type: ignore[assignment]
