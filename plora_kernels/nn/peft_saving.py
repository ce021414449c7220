"""Save adapters in PEFT's file format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plora_kernels.errors import ConfigError, TargetError
from plora_kernels.nn.adapter_files import (
    write_adapter,
)
from plora_kernels.nn.adapter_tensors import (
    gather,
)
from plora_kernels.nn.config import PLoRAConfig, check_task_type
from plora_kernels.nn.embeddings import base_name, embeddings_to_save
from plora_kernels.nn.injected import Injected
from plora_kernels.nn.linear import FusedPLoRALinear, adapter_scale
from plora_kernels.nn.peft_layout import check_as_adapted, exact_targets, exactly, layout_of
from plora_kernels.nn.plain_names import plain_names
from plora_kernels.nn.saved_modules import modules_saved_whole


def save_peft(
    handle: Injected,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | os.PathLike[str] | None = None,
    task_type: str | None = None,
    save_embedding_layers: bool | str = "auto",
) -> Path:
    """Write the adapter as PEFT writes it, so that `PeftModel.from_pretrained` loads it, and return the directory.

    The files hold every layer's full A (R, K) and B (N, R), whatever is selected at the moment, and the whole modules
    that PEFT will look for: the modules to save, and the head of a classification or question-answering task. Before
    anything is written PEFT is asked, on an outline of the model, what it makes of the configuration: the same layers
    with the same ranks and scales. An existing adapter in the directory is replaced once both files are complete; its
    other files are not touched.

    Args:
        handle: what `inject` or `load_peft` returned. directory: created if it does not exist.
        base_model_name_or_path: written to the configuration, for `AutoPeftModel`; None takes the name or path that the
            model was loaded from.
        task_type: PEFT's task type; None takes that of `handle.config`.
        save_embedding_layers: as in PEFT. True saves the input and output embeddings as well; "auto" does so if the
            vocabulary is not that of the base model, whose configuration is read from its folder or the local cache.

    Raises:
        ConfigError: the directory is a file, or an argument cannot be used.
        TargetError: PEFT would not load the adapter into the same layers, for instance because one lies in a module
            that PEFT saves whole. Nothing is written.

    >>> import tempfile
    >>> from torch import nn
    >>> from plora_kernels.nn.inject import PLoRAConfig, inject
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> handle = inject(model, PLoRAConfig(rank=2, target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_peft(handle, folder)
    ...     sorted(os.listdir(folder))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; a directory is needed to save an adapter in")
    task_type = _checked_task(task_type, handle.config.task_type)
    _refuse_adapted_heads(handle, task_type)
    model, layers = handle.model, handle.layers
    base = os.fspath(base_model_name_or_path) if base_model_name_or_path else base_name(model)
    embeddings = embeddings_to_save(model, base, save_embedding_layers)
    targets = exact_targets(layers, plain_names(model).values())
    lora = _to_lora_config(
        handle.config,
        layers,
        target_modules=targets,
        modules_to_save=list(handle.saved_modules) or None,
        task_type=task_type,
        base_model_name_or_path=base,
    )
    layout = layout_of(model, lora)
    check_as_adapted(layers, layout)
    carried = handle.carried if save_embedding_layers is not False else ()
    tensors = gather(model, layers, layout, embeddings, carried)
    for key in layout.shapes.keys() - tensors.keys():
        raise TargetError(f"PEFT would look for {key!r} in the saved adapter, and the model has no such tensor")
    mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}  # for AutoPeftModel
    write_adapter(target, lora, tensors, targets, None if task_type else mapping)
    return target


def _checked_task(given: str | None, injected: str | None) -> str | None:
    task = given or injected
    if task is None:
        return None
    check_task_type(task)
    if injected and task != injected:
        raise ConfigError(f"task_type is {task!r}, but the adapter was injected with task_type {injected!r}")
    return str(getattr(task, "value", task))


def _refuse_adapted_heads(handle: Injected, task_type: str | None) -> None:
    """Raise TargetError if a layer lies in a module that PEFT saves whole: it would have no adapter there."""
    names = plain_names(handle.model)  # a part of the model may have been compiled since
    for outer in map(names.__getitem__, modules_saved_whole(handle.model, handle.saved_modules, task_type)):
        for name in handle.layers:
            if f"{name}.".startswith(f"{outer}."):
                task = f" for task_type {task_type!r}" if task_type else ""
                raise TargetError(
                    f"{name!r} is adapted, but PEFT saves {outer!r} whole{task}; leave it out of the targets"
                )


def _to_lora_config(config: PLoRAConfig, layers: Mapping[str, FusedPLoRALinear], **options: Any) -> Any:
    """Return PEFT's configuration of the layers as they are now; other code may have set a layer's rank or scale."""
    from peft import LoraConfig

    alphas = {name: _alpha_of(layer) for name, layer in layers.items()}
    return LoraConfig(
        r=config.rank,
        lora_alpha=_whole(config.alpha),
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilized,
        rank_pattern={exactly(name): layer.rank for name, layer in layers.items() if layer.rank != config.rank},
        alpha_pattern={exactly(name): _whole(alpha) for name, alpha in alphas.items() if alpha != config.alpha},
        inference_mode=True,
        **options,
    )


def _alpha_of(layer: FusedPLoRALinear) -> float:
    """Return the α that gives the layer's scale at its rank."""
    if adapter_scale(layer.rank, layer.alpha, layer.rank_stabilized) == layer.scale:
        return layer.alpha
    return layer.scale / adapter_scale(layer.rank, 1.0, layer.rank_stabilized)


def _whole(alpha: float) -> float | int:
    """Return α as an int where it is one: PEFT's files hold an int."""
    return int(alpha) if float(alpha).is_integer() else alpha
