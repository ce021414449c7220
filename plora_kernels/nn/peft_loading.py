"""Load adapters in PEFT's file format, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plora_kernels.errors import ConfigError, PLoRAWarning, StateError, TargetError
from plora_kernels.nn.adapter_config import shown, shown_path
from plora_kernels.nn.adapter_dtype import check_adapter_dtype
from plora_kernels.nn.adapter_files import (
    CONFIG_NAME,
    check_directory,
    read_config,
    read_tensors,
    weights_path,
)
from plora_kernels.nn.adapter_source import find_adapter
from plora_kernels.nn.adapter_tensors import (
    base_weights,
    check_modules_exist,
    check_others,
    fit,
    still_tied,
    untie,
    with_present_names,
)
from plora_kernels.nn.config import PLoRAConfig, pattern_matches
from plora_kernels.nn.inject import inject
from plora_kernels.nn.injected import Injected
from plora_kernels.nn.layer_errors import naming
from plora_kernels.nn.peft_layout import Layout, check_as_adapted, exact_targets, exactly, layout_of
from plora_kernels.nn.plain_names import is_compiled, plain_names
from plora_kernels.nn.targets import is_within, shortened


def load_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    trainable: bool = True,
    adapter_dtype: torch.dtype | str = "auto",
    subfolder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Injected:
    """Inject a saved PEFT LoRA adapter into a plain base model, in place, and return its handle.

    Which layers are adapted, their ranks and α, and which modules were saved whole is what PEFT itself makes of the
    configuration; the tensors must be exactly those. Whole modules and embeddings replace the model's own values, of
    which the handle keeps copies for `restore`; so do other weights of the base in the file, as in PEFT, after a
    warning. A whole module that shares a weight gets its own, after a warning. `adapter_model.bin` is read
    too, nothing but tensors.

    Args:
        model: the base. directory: what `save_peft` or PEFT wrote, or the id of a repository on the Hugging Face hub,
            such as "user/adapter", if there is no folder of this name.
        trainable: False loads for inference: no parameter requires a gradient, those of whole modules and those that
            `select` and `unfold` make included, and the model is in evaluation mode, as in PEFT.
        adapter_dtype: the factors' dtype, whatever the file's: a torch dtype, its name, or "auto": float32 over a
            weight of half precision, as in PEFT (`autocast_adapter_dtype`), else the weight's.
        subfolder: where in the folder or repository the adapter is.
        revision, token, cache_dir, local_files_only: as `huggingface_hub` takes them; not used for a folder.

    Raises:
        ConfigError: the directory holds no PEFT LoRA adapter, or one with features this package does not support, or
            with NaN, infinity or numbers above the largest of the model's dtype; there is no such `adapter_dtype`; or
            nothing of this name is here or on the hub.
        TargetError, ShapeError, DTypeError, RankError: tensors, configuration and model do not fit each other.
        StateError: the model is compiled or holds adapted layers already. After any error the model is as it was.

    >>> import tempfile
    >>> from plora_kernels.nn.peft_saving import save_peft
    >>> saved, model = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_peft(inject(saved, PLoRAConfig(rank=2, target_modules=["0"])), folder)
    ...     list(load_peft(model, folder, trainable=False).layers)
    ['0']
    >>> any(parameter.requires_grad for parameter in model.parameters())
    False
    """
    for name, module in model.named_modules():
        if is_compiled(module):
            where = f"module {name!r}" if name else "the model"
            raise StateError(f"{where} is compiled; load into the plain one, its _orig_mod, and compile afterwards")
    check_adapter_dtype(adapter_dtype)
    source = find_adapter(
        directory,
        subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    read = _read(source, model)
    layout, others = read.layout, read.others
    if replaced := base_weights(others, model, layout.whole):
        warnings.warn(
            f"{read.path} replaces weights of the base model, as in PEFT: {shortened(replaced)}; restore() puts them "
            "back",
            PLoRAWarning,
            stacklevel=2,
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    config = _to_config(read.lora, layout, names, adapter_dtype)
    with torch.no_grad(), ExitStack() as undo:
        untie(model, layout.whole, undo)
        handle = inject(model, config)
        handle.put_back_with(undo.pop_all())
        undo.callback(handle.restore)
        handle.set_factors(read.factors)
        handle.replace_values(others)
        undo.pop_all()
    whole = tuple(f"{name}." for name in layout.whole)
    handle.carried = tuple(key for key in others if not key.startswith(whole))
    if not trainable:
        handle.set_trainable(False)
        model.eval()
    return handle


def load_into(handle: Injected, directory: str | os.PathLike[str]) -> None:
    """Copy a saved adapter into the adapter that a model has: the same layers, ranks, scales and whole modules.

    Parameters stay the objects they are, so an optimiser goes on with them. A selection is made again on the new
    values.

    Raises:
        ConfigError, TargetError, ShapeError, DTypeError: the errors of `load_peft`, or another adapter than the
            model's. StateError: a weight was changed while modules were folded into it, or the adapter was taken out.
            Nothing is changed.
    """
    handle.check_present()
    source = check_directory(directory)
    for name, layer in handle.layers.items():
        with naming(name):
            layer.check_unfoldable()
    read = _read(source, handle.model)
    check_as_adapted(handle.layers, read.layout)
    names = plain_names(handle.model)
    saved = [names[name] for name in handle.saved_modules]
    if set(saved) != set(read.layout.whole):
        theirs, ours = shortened(read.layout.whole) or "none", shortened(saved) or "none"
        raise TargetError(f"{read.path} is of an adapter with the whole modules {theirs}; the model's has {ours}")
    with torch.no_grad():
        handle.replace_values({key: value for key, value in read.others.items() if not is_within(saved, key)})
        handle.write_values({key: value for key, value in read.others.items() if is_within(saved, key)})
        for name, (lora_A, lora_B) in read.factors.items():
            handle.layers[name].replace_factors(lora_A, lora_B)


@dataclass(frozen=True)
class _Read:
    """An adapter's files, checked against a model.

    `lora` is PEFT's configuration, `layout` what it makes of the model; `factors` are A and B by layer, `others`
    further tensors by their keys in the model; `path` is the tensors' file, for messages.
    """

    lora: Any
    layout: Layout
    factors: dict[str, tuple[Tensor, Tensor]]
    others: dict[str, Tensor]
    path: str


def _read(source: Path, model: nn.Module) -> _Read:
    """Read both files of a directory for a model, which is not changed; the errors are those of `load_peft`."""
    lora = read_config(source, model)
    tensors, path = with_present_names(read_tensors(source, model), model, lora), shown_path(weights_path(source))
    check_modules_exist(tensors, model, path)
    layout = layout_of(model, lora)
    _check_plain(lora, layout, shown_path(source / CONFIG_NAME))
    fitted = fit(tensors, layout, path)
    others = still_tied(fitted, model, layout.whole)
    check_others(others, model, layout.whole)
    return _Read(lora, layout, fitted.factors, others, path)


def _check_plain(lora: Any, layout: Layout, path: str) -> None:
    """Raise ConfigError if PEFT makes a layer compute more than LoRA; warn of patterns that are for no layer."""
    for name, layer in layout.layers.items():
        if layer.variant is not None:
            raise ConfigError(f"{path} makes {name!r} a {layer.variant} in PEFT; only plain LoRA is supported")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, field):
            if not any(pattern_matches(key, name) for name in layout.layers):
                warnings.warn(f"{path} has {shown(key)} in {field}, which matches no targeted module", stacklevel=4)


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
        rank_pattern={exactly(name): layer.rank for name, layer in layers.items() if layer.rank != rank},
        alpha_pattern={exactly(name): layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        adapter_dtype=adapter_dtype,
    )
