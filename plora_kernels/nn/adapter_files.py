"""The two files of a saved adapter, read and written: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plora_kernels.errors import ConfigError
from plora_kernels.nn.adapter_config import (
    UNDERSTOOD,
    first_line,
    parse_config,
    refuse_other_fields,
    shown,
    shown_path,
    without_repeats,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"  # what PEFT wrote before safetensors
_HEADER_BYTES = 8  # of a safetensors file: the size of the JSON that follows


def check_directory(directory: str | os.PathLike[str], inside: str = "") -> Path:
    """Return a folder, or one inside it, as a path; raise ConfigError unless it holds an adapter's two files."""
    try:
        source = Path(directory) / inside
    except TypeError:
        raise ConfigError(f"directory is {shown(directory)}; a path is needed") from None
    for path in (source / CONFIG_NAME, weights_path(source)):
        if _is_file(path):
            continue
        what = "is not a file" if os.path.lexists(path) else "does not exist"
        raise ConfigError(f"{shown_path(path)} {what}; a directory with {CONFIG_NAME} and {WEIGHTS_NAME} is needed")
    return source


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that may not be entered
        return False


def weights_path(source: Path) -> Path:
    """Return the file of tensors that PEFT reads from the directory: the pickled one only without the other."""
    # Path.exists would raise an error for a folder that may not be entered.
    pickled = _is_file(source / PICKLED_NAME) and not os.path.exists(source / WEIGHTS_NAME)  # noqa: PTH110
    return source / (PICKLED_NAME if pickled else WEIGHTS_NAME)


def read_tensors(source: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the saved tensors by key; keys of a model's older names are renamed to its present ones, as PEFT does.

    From an `adapter_model.bin` nothing but tensors is unpickled.

    Raises:
        ConfigError: the file cannot be read, holds something else than plain tensors, or one of them twice.
    """
    from peft.utils import load_peft_weights

    path, renamed = weights_path(source), getattr(model, "_checkpoint_conversion_mapping", None)
    where = shown_path(path)
    if path.name == WEIGHTS_NAME:
        _refuse_repeats(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates kinds of tensors that older files hold
            tensors = load_peft_weights(str(source), device="cpu", key_mapping=renamed or None)
    except Exception as error:  # each library and each kind of damage has its own
        if path.name == PICKLED_NAME:  # torch's own message tells how to run the code in it
            raise ConfigError(f"{where} is not a pickled dict of tensors, or is cut off") from error
        raise ConfigError(f"{where} is not a safetensors file, or is cut off: {first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigError(f"{where} does not hold a dict of tensors")
    for key, value in tensors.items():
        if not isinstance(key, str):
            raise ConfigError(f"{where} holds a tensor under {shown(key)}; names are needed")
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or type(value) not in (Tensor, nn.Parameter):
            kind = type(value).__name__ if value.layout is torch.strided else str(value.layout)
            raise ConfigError(f"{where} holds {shown(key)} as a {kind} on {value.device}; a plain tensor is needed")
    return {key: value.detach() for key, value in tensors.items()}


def _refuse_repeats(path: Path) -> None:
    """Raise ConfigError if a safetensors file names a tensor twice: of the two, one would be lost without a word."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(_HEADER_BYTES), "little")
            if size <= path.stat().st_size:
                json.loads(file.read(size), object_pairs_hook=without_repeats)
    except ConfigError as error:
        raise ConfigError(f"{shown_path(path)} {error}") from None
    except (OSError, ValueError, RecursionError, MemoryError):  # safetensors itself says what is wrong
        return


def renamed_by_peft(tensors: Mapping[str, Tensor], model: nn.Module, lora: Any) -> Mapping[str, Tensor]:
    """Return an adapter's tensors by the keys that PEFT gives them for the model's present names, or as they are."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

        return dict(convert_peft_adapter_state_dict_for_transformers(model, lora, dict(tensors)))
    except Exception:  # of an older PEFT without this, or for keys that it cannot convert
        return tensors


def read_config(source: Path, model: nn.Module) -> Any:
    """Return the directory's `LoraConfig`, refused if it asks for more than plain LoRA.

    Raises:
        ConfigError: not a LoRA configuration, or one with a feature that is not supported or not known.
    """
    from peft import LoraConfig, PeftConfig

    path = source / CONFIG_NAME
    where, written = shown_path(path), parse_config(path, sum(1 for _ in model.modules()))
    given = {name: value for name, value in written.items() if name != "runtime_config"}  # of a run, not of an adapter
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields it does not know: they are refused below
            lora = PeftConfig.from_peft_type(**given)
    except Exception as error:  # no known type, odd values
        raise ConfigError(f"{where} is not an adapter's configuration: {first_line(error)}") from error
    if type(lora) is not LoraConfig:
        kind = getattr(lora.peft_type, "value", lora.peft_type)
        raise ConfigError(f"{where} is the configuration of a {kind} adapter; LoRA is needed")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name in sorted(written.keys() - known - UNDERSTOOD):
        if written[name]:
            field = name if name.isidentifier() else shown(name)
            raise ConfigError(
                f"{where} has {field} = {shown(written[name])}, which this version of PEFT does not know; upgrade PEFT"
            )
    refuse_other_fields(where, lora, written)
    lora.rank_pattern, lora.alpha_pattern = lora.rank_pattern or {}, lora.alpha_pattern or {}
    return lora


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
