"""A `LoraConfig` of PEFT's in the terms of `PLoRAConfig`; what the layers do not compute is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from plora_kernels.errors import ConfigError
from plora_kernels.nn.adapter_config import check_fields, refuse_other_fields, shown
from plora_kernels.nn.peft_layout import exact_targets, layout_of

WHERE = "the LoraConfig"


def options_from_peft(lora: Any, model: nn.Module | None, targets_given: bool) -> dict[str, Any]:
    """Return `PLoRAConfig`'s arguments for a `LoraConfig`, which is not changed.

    Args:
        model: asked through PEFT for the layers that only a model decides, unless `targets_given`.
        targets_given: the caller names the targets; those of `lora` are not looked at.

    Raises:
        ConfigError: not a LoraConfig, or one with a field that is not supported, or that needs the model.
        TargetError: PEFT refuses the configuration for the model.
    """
    from peft import LoraConfig

    if type(lora) is not LoraConfig:
        raise ConfigError(f"from_peft got a {type(lora).__name__}; a peft.LoraConfig is needed")
    if lora.init_lora_weights is not True:
        raise ConfigError(
            f"{WHERE} has init_lora_weights = {shown(lora.init_lora_weights)}; inject starts as True does. Start the "
            "adapter with PEFT, save it and load it with load_peft, or set the factors after injecting"
        )
    written = {field.name: _plain(getattr(lora, field.name)) for field in dataclasses.fields(lora)}
    check_fields(WHERE, written)
    refuse_other_fields(WHERE, lora, written)
    if getattr(lora, "ensure_weight_tying", False):  # which older versions do not have
        raise ConfigError(f"{WHERE} has ensure_weight_tying = True; only False is supported")
    if custom := getattr(lora, "_custom_modules", None):
        raise ConfigError(f"{WHERE} has layers of its own for {', '.join(kind.__name__ for kind in custom)}")
    options = {
        "rank": lora.r,
        "alpha": float(lora.lora_alpha),
        "rank_stabilized": bool(lora.use_rslora),
        "dropout": lora.lora_dropout,
        "exclude_modules": written["exclude_modules"] or None,
        "modules_to_save": tuple(written["modules_to_save"] or ()),
        "task_type": written["task_type"],
        "rank_pattern": dict(lora.rank_pattern or {}),
        "alpha_pattern": {key: float(alpha) for key, alpha in (lora.alpha_pattern or {}).items()},
    }
    if not targets_given:
        options["target_modules"] = _targets(lora, written, model)
    return options


def _targets(lora: Any, written: dict[str, Any], model: nn.Module | None) -> Any:
    """Return the target modules as they are written, or where only a model decides, the layers PEFT adapts in it."""
    by_layer = lora.layers_to_transform not in (None, [])
    if lora.target_modules is not None and not by_layer:
        return written["target_modules"]
    if model is None:
        what = f"layers_to_transform = {shown(lora.layers_to_transform)}" if by_layer else "target_modules = None"
        raise ConfigError(
            f"{WHERE} has {what}, which means certain layers of a model: pass the model to from_peft, or target_modules"
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return exact_targets(layout_of(model, lora).layers, names)


def _plain(value: Any) -> Any:
    """Return a field's value as it would be in a file: names in a list, a set's in alphabetical order; tables."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, tuple):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return getattr(value, "value", value)  # of PEFT's enumerations
