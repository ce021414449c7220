"""The two files of a saved adapter, read and written: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plora_kernels.errors import ConfigError
from plora_kernels.nn.peft_layout import first_line

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"  # what PEFT wrote before safetensors
# The fields of an adapter's configuration that are understood here, or say nothing of what a saved adapter computes.
# All others must have their default value: a feature that a later version of PEFT brings is refused, never ignored.
_UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    "fan_in_fan_out",  # PEFT turns it off for nn.Linear, the only layer there is here
}
# Starts that leave the base weight as it is, in any letter case, and beginnings of those that take something from it.
# PEFT does so again when it loads the adapter, except for "lora_ga", whose base has to be saved after the start.
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_directory(source: Path) -> None:
    """Raise ConfigError unless the directory holds a configuration and a file of tensors."""
    for path in (source / CONFIG_NAME, weights_path(source)):
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; a directory with {CONFIG_NAME} and {WEIGHTS_NAME} is needed")


def weights_path(source: Path) -> Path:
    """Return the file of tensors that PEFT reads from the directory: the pickled one only without the other."""
    pickled = (source / PICKLED_NAME).is_file() and not (source / WEIGHTS_NAME).is_file()
    return source / (PICKLED_NAME if pickled else WEIGHTS_NAME)


def read_tensors(source: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the saved tensors by key; keys of a model's older names are renamed to its present ones, as PEFT does.

    From an `adapter_model.bin` nothing but tensors is unpickled.

    Raises:
        ConfigError: the file cannot be read, or holds something else than tensors.
    """
    from peft.utils import load_peft_weights

    path, renamed = weights_path(source), getattr(model, "_checkpoint_conversion_mapping", None)
    try:
        tensors = load_peft_weights(str(source), device="cpu", key_mapping=renamed or None)
    except Exception as error:  # each library and each kind of damage has its own
        if path.name == PICKLED_NAME:  # torch's own message tells how to run the code in it
            raise ConfigError(f"{path} is not a pickled dict of tensors, or is cut off") from error
        raise ConfigError(f"{path} is not a safetensors file, or is cut off: {first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigError(f"{path} does not hold a dict of tensors")
    return tensors


def renamed_by_peft(tensors: Mapping[str, Tensor], model: nn.Module, lora: Any) -> Mapping[str, Tensor]:
    """Return an adapter's tensors by the keys that PEFT gives them for the model's present names, or as they are."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

        return dict(convert_peft_adapter_state_dict_for_transformers(model, lora, dict(tensors)))
    except Exception:  # of an older PEFT without this, or for keys that it cannot convert
        return tensors


def read_config(source: Path) -> Any:
    """Return the directory's `LoraConfig`, refused if it asks for more than plain LoRA.

    Raises:
        ConfigError: not a LoRA configuration, or one with a feature that is not supported or not known.
    """
    from peft import LoraConfig, PeftConfig

    path = source / CONFIG_NAME
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        _check_start(path, written.get("init_lora_weights"))
        _check_values(path, written)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields it does not know: they are refused below
            lora = PeftConfig.from_pretrained(str(source))
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON object, no known type, odd values
        raise ConfigError(f"{path} is not an adapter's configuration: {error!r}") from error
    if type(lora) is not LoraConfig:
        kind = getattr(lora.peft_type, "value", lora.peft_type)
        raise ConfigError(f"{path} is the configuration of a {kind} adapter; LoRA is needed")
    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    for name in sorted(written.keys() - fields.keys() - _UNDERSTOOD):
        if written[name]:
            raise ConfigError(
                f"{path} has {name} = {written[name]!r}, which this version of PEFT does not know; upgrade PEFT"
            )
    for name in sorted(fields.keys() - _UNDERSTOOD):
        value, default = getattr(lora, name), _default(fields[name])
        if value != default and (value or default):
            raise ConfigError(f"{path} has {name} = {written.get(name, value)!r}; only {default!r} is supported")
    lora.rank_pattern, lora.alpha_pattern = lora.rank_pattern or {}, lora.alpha_pattern or {}
    return lora


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _check_start(path: Path, start: object) -> None:
    """Raise ConfigError unless `init_lora_weights` leaves the base weight as it is."""
    if isinstance(start, bool | None) or str(start).lower() in _PLAIN_STARTS:
        return
    if str(start).lower().startswith(_CHANGING_STARTS):
        raise ConfigError(
            f"{path} has init_lora_weights = {start!r}, which changes the base weight; convert the adapter to plain "
            "LoRA with PEFT first (save_pretrained's path_initial_model_for_weight_conversion)"
        )
    raise ConfigError(f"{path} has init_lora_weights = {start!r}; known are true, false, {', '.join(_PLAIN_STARTS)}")


def _check_values(path: Path, written: Mapping[str, Any]) -> None:
    """Raise ConfigError for ranks, α and regular expressions that PEFT takes now and fails on later."""
    patterns = {field: written.get(field) or {} for field in ("rank_pattern", "alpha_pattern")}
    ranks = {"r": written.get("r", 8)} | {f"rank_pattern[{key!r}]": r for key, r in patterns["rank_pattern"].items()}
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError(f"{path} has {name} = {rank!r}; a positive integer is needed")
    alphas = {"lora_alpha": written.get("lora_alpha", 8)}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in patterns["alpha_pattern"].items()}
    for name, alpha in alphas.items():
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
            raise ConfigError(f"{path} has {name} = {alpha!r}; a positive number is needed")
    modules = [written.get(field) for field in ("target_modules", "exclude_modules")]
    for expression in [*patterns["rank_pattern"], *patterns["alpha_pattern"], *modules]:
        if isinstance(expression, str):
            try:
                re.compile(expression)
            except re.error as error:
                raise ConfigError(f"{path} holds {expression!r}, no regular expression: {error}") from error


def write_adapter(
    target: Path, lora: Any, tensors: Mapping[str, Tensor], targets: Sequence[str] | str, auto_mapping: Any
) -> None:
    """Write both files into the directory, which is created; an adapter there is replaced once both are complete."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".adapter-", dir=target))
    try:
        save_file(dict(tensors), staging / WEIGHTS_NAME, metadata={"format": "pt"})
        lora.save_pretrained(os.fspath(staging), auto_mapping_dict=auto_mapping)
        _put_in_order(staging / CONFIG_NAME, targets)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (staging / name).replace(target / name)
    finally:
        shutil.rmtree(staging)


def _put_in_order(path: Path, targets: Sequence[str] | str) -> None:
    """Write the target modules in model order: PEFT holds them as a set, whose order changes from run to run."""
    written = json.loads(path.read_text(encoding="utf-8"))
    written["target_modules"] = targets
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
