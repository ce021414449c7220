"""Save and load adapters in PEFT's file format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plora_kernels.errors import ConfigError, PLoRAWarning, StateError, TargetError
from plora_kernels.nn.adapter_config import shown, shown_path
from plora_kernels.nn.adapter_dtype import check_adapter_dtype
from plora_kernels.nn.adapter_files import (
    CONFIG_NAME,
    check_directory,
    read_config,
    read_tensors,
    weights_path,
    write_adapter,
)
from plora_kernels.nn.adapter_tensors import (
    base_weights,
    check_modules_exist,
    check_others,
    fit,
    gather,
    still_tied,
    untie,
    with_present_names,
)
from plora_kernels.nn.config import PLoRAConfig, check_task_type, pattern_matches
from plora_kernels.nn.embeddings import base_name, embeddings_to_save
from plora_kernels.nn.inject import inject
from plora_kernels.nn.injected import Injected
from plora_kernels.nn.linear import FusedPLoRALinear, adapter_scale
from plora_kernels.nn.peft_layout import Layout, exact_targets, layout_of
from plora_kernels.nn.plain_names import is_compiled, plain_names
from plora_kernels.nn.saved_modules import modules_saved_whole
from plora_kernels.nn.targets import shortened


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
    _check_as_adapted(layers, layout)
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
        rank_pattern={_exactly(name): layer.rank for name, layer in layers.items() if layer.rank != config.rank},
        alpha_pattern={_exactly(name): _whole(alpha) for name, alpha in alphas.items() if alpha != config.alpha},
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


def _exactly(name: str) -> str:
    """Return a pattern key that matches this module alone: PEFT matches keys as expressions with the end of a name."""
    return "^" + re.escape(name)


def _check_as_adapted(layers: Mapping[str, FusedPLoRALinear], layout: Layout) -> None:
    """Raise TargetError unless PEFT adapts the same layers, with the same ranks and scales."""
    for name, layer in layers.items():
        theirs = layout.layers.get(name)
        if theirs is None:
            experts = ", ".join(map(repr, layout.parameters[:2]))
            why = f": it would adapt the stacked experts {experts} instead, so leave it out" if experts else ""
            raise TargetError(f"{name!r} is adapted, but PEFT would not adapt it from the saved configuration{why}")
        if theirs.rank != layer.rank or not math.isclose(theirs.scale, layer.scale, rel_tol=1e-9):
            raise TargetError(
                f"{name!r} has rank {layer.rank} and scale {layer.scale:g}, but PEFT would give it rank {theirs.rank} "
                f"and scale {theirs.scale:g}"
            )
    for name in layout.layers.keys() - layers.keys():
        raise TargetError(f"{name!r} is not adapted, but PEFT would adapt it from the saved configuration")


def load_peft(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter_dtype: torch.dtype | str = "auto"
) -> Injected:
    """Inject a saved PEFT LoRA adapter into a plain base model, in place, and return its handle.

    Which layers are adapted, their ranks and α, and which modules were saved whole is what PEFT itself makes of the
    configuration; the tensors must be exactly those. Whole modules and embeddings replace the model's own values, of
    which the handle keeps copies for `restore`; so do other weights of the base in the file, as in PEFT, after a
    warning. A whole module that shares a weight gets its own, after a warning. `adapter_model.bin` is read
    too, nothing but tensors.

    Args:
        model: the base. directory: what `save_peft` or PEFT wrote.
        adapter_dtype: the factors' dtype, whatever the file's: a torch dtype, its name, or "auto": float32 over a
            weight of half precision, as in PEFT (`autocast_adapter_dtype`), else the weight's.

    Raises:
        ConfigError: the directory holds no PEFT LoRA adapter, or one with features this package does not support, or
            with NaN, infinity or numbers above the largest of the model's dtype; or there is no such `adapter_dtype`.
        TargetError, ShapeError, DTypeError, RankError: tensors, configuration and model do not fit each other.
        StateError: the model is compiled or holds adapted layers already. After any error the model is as it was.

    >>> import tempfile
    >>> from plora_kernels.nn.inject import PLoRAConfig, inject
    >>> saved, model = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_peft(inject(saved, PLoRAConfig(rank=2, target_modules=["0"])), folder)
    ...     list(load_peft(model, folder).layers)
    ['0']
    """
    for name, module in model.named_modules():
        if is_compiled(module):
            where = f"module {name!r}" if name else "the model"
            raise StateError(f"{where} is compiled; load into the plain one, its _orig_mod, and compile afterwards")
    check_adapter_dtype(adapter_dtype)
    source = check_directory(directory)
    lora = read_config(source, model)
    tensors, path = with_present_names(read_tensors(source, model), model, lora), shown_path(weights_path(source))
    check_modules_exist(tensors, model, path)
    layout = layout_of(model, lora)
    _check_plain(lora, layout, shown_path(source / CONFIG_NAME))
    fitted = fit(tensors, layout, path)
    others = still_tied(fitted, model, layout.whole)
    check_others(others, model, layout.whole)
    if replaced := base_weights(others, model, layout.whole):
        warnings.warn(
            f"{path} replaces weights of the base model, as in PEFT: {shortened(replaced)}; restore() puts them back",
            PLoRAWarning,
            stacklevel=2,
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    config = _to_config(lora, layout, names, adapter_dtype)
    with torch.no_grad(), ExitStack() as undo:
        untie(model, layout.whole, undo)
        handle = inject(model, config)
        handle.put_back_with(undo.pop_all())
        undo.callback(handle.restore)
        handle.set_factors(fitted.factors)
        handle.replace_values(others)
        undo.pop_all()
    whole = tuple(f"{name}." for name in layout.whole)
    handle.carried = tuple(key for key in others if not key.startswith(whole))
    return handle


def _check_plain(lora: Any, layout: Layout, path: str) -> None:
    """Raise ConfigError if PEFT makes a layer compute more than LoRA; warn of patterns that are for no layer."""
    for name, layer in layout.layers.items():
        if layer.variant is not None:
            raise ConfigError(f"{path} makes {name!r} a {layer.variant} in PEFT; only plain LoRA is supported")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, field):
            if not any(pattern_matches(key, name) for name in layout.layers):
                warnings.warn(f"{path} has {shown(key)} in {field}, which matches no targeted module", stacklevel=3)


def _to_config(lora: Any, layout: Layout, names: Iterable[str], adapter_dtype: torch.dtype | str) -> PLoRAConfig:
    """Return the configuration that injects what PEFT adapts into a model with modules of these names."""
    layers = layout.layers
    first = next(iter(layers.values()))
    rank, alpha = int(lora.r), float(lora.lora_alpha)
    if all(layer.rank != rank for layer in layers.values()):
        rank = first.rank
    return PLoRAConfig(
        rank=rank,
        alpha=alpha,
        rank_stabilized=bool(lora.use_rslora),
        dropout=first.dropout,
        target_modules=exact_targets(layers, names),
        modules_to_save=layout.whole,
        task_type=None if lora.task_type is None else str(getattr(lora.task_type, "value", lora.task_type)),
        rank_pattern={_exactly(name): layer.rank for name, layer in layers.items() if layer.rank != rank},
        alpha_pattern={_exactly(name): layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        adapter_dtype=adapter_dtype,
    )
