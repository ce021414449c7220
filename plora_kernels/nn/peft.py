"""Save and load adapters in PEFT's file format: `adapter_config.json` and `adapter_model.safetensors`.

This is the only file that imports PEFT, and it does so only when one of its functions is called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plora_kernels.errors import ConfigError, ShapeError, TargetError
from plora_kernels.nn.inject import Injected, PLoRAConfig, inject
from plora_kernels.nn.saved_modules import modules_saved_whole

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(rf"^{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
# Features of PEFT that this package does not support: the configuration's field, and the value that turns it off.
_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_qalora": False,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "velora_config": None,
    "use_bdlora": None,
    "layer_replication": None,
    "monteclora_config": None,
}
# Initialisations that do not change the base weight. The others subtract something from it, and PEFT does so again when
# it loads the adapter.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


def save_peft(
    handle: Injected,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Write the adapter as PEFT writes it, so that `PeftModel.from_pretrained` loads it, and return the directory.

    The files hold every layer's full A (R, K) and B (N, R), whatever is selected at the moment, and the whole modules
    that PEFT will look for: the modules to save, and the head of a classification or question-answering task. An
    existing adapter in the directory is replaced once both files are complete; its other files are not touched.

    Args:
        handle: what `inject` returned. directory: created if it does not exist.
        base_model_name_or_path: written to the configuration, for `AutoPeftModel`.
        task_type: PEFT's task type; None takes that of `handle.config`.

    >>> import tempfile
    >>> from plora_kernels.nn.inject import PLoRAConfig, inject
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> handle = inject(model, PLoRAConfig(rank=2, target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_peft(handle, folder)
    ...     sorted(os.listdir(folder))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; a directory is needed to save an adapter in")
    config = handle.config
    task_type = task_type or config.task_type
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=_whole(config.alpha),
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilized,
        target_modules=list(handle.layers),
        modules_to_save=list(handle.saved_modules) or None,
        rank_pattern={_exactly(n): layer.rank for n, layer in handle.layers.items() if layer.rank != config.rank},
        alpha_pattern={
            _exactly(n): _whole(layer.alpha) for n, layer in handle.layers.items() if layer.alpha != config.alpha
        },
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for name, (lora_A, lora_B) in handle.factors().items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = lora_A.cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = lora_B.cpu().contiguous()
    for name in modules_saved_whole(handle.model, handle.saved_modules, task_type):
        for key, value in handle.model.get_submodule(name).state_dict().items():
            tensors[f"{_PREFIX}{name}.{key}"] = value.detach().cpu().contiguous().clone()
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".adapter-", dir=target))
    try:
        save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        lora.save_pretrained(staging)
        _put_in_order(staging / CONFIG_NAME, list(handle.layers))
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (staging / name).replace(target / name)
    finally:
        shutil.rmtree(staging)
    return target


def _put_in_order(path: Path, targets: list[str]) -> None:
    """Write the target modules in model order: PEFT holds them as a set, whose order changes from run to run."""
    written = json.loads(path.read_text(encoding="utf-8"))
    written["target_modules"] = targets
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _exactly(name: str) -> str:
    """Return a pattern key that matches this module alone: PEFT matches keys as expressions with the end of a name."""
    return "^" + re.escape(name)


def _whole(alpha: float) -> float | int:
    """Return α as an int where it is one: PEFT's files hold an int."""
    return int(alpha) if float(alpha).is_integer() else alpha


def load_peft(model: nn.Module, directory: str | os.PathLike[str]) -> Injected:
    """Inject a saved PEFT LoRA adapter into a plain base model, in place, and return its handle.

    Ranks and α may differ between modules (`rank_pattern`, `alpha_pattern`); modules that were saved whole replace the
    model's own. The factors take the dtype of the weight they belong to.

    Raises:
        ConfigError: the directory holds no PEFT LoRA adapter, or one with features this package does not support.
        TargetError, ShapeError: the adapter does not fit the model. The model is not changed then.

    >>> import tempfile
    >>> from plora_kernels.nn.inject import PLoRAConfig, inject
    >>> saved, model = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_peft(inject(saved, PLoRAConfig(rank=2, target_modules=["0"])), folder)
    ...     list(load_peft(model, folder).layers)
    ['0']
    """
    source = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (source / name).is_file():
            raise ConfigError(
                f"{source / name} does not exist; a directory with {CONFIG_NAME} and {WEIGHTS_NAME} is needed"
            )
    lora = _read_config(source)
    factors, others = _split(_read_tensors(source / WEIGHTS_NAME), source)
    _check_factors_fit(model, factors)
    _check_others_fit(model, others)
    task = None if lora.task_type is None else str(getattr(lora.task_type, "value", lora.task_type))
    whole = modules_saved_whole(model, lora.modules_to_save or (), task)
    whole = tuple(name for name in whole if any(key.startswith(f"{name}.") for key in others))
    handle = inject(model, _to_config(lora, factors, whole, task))
    handle.set_factors(factors)
    with torch.no_grad():
        state = model.state_dict()  # its tensors are the model's own
        for key, value in others.items():
            state[key].copy_(value)
    return handle


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a safetensors file, or is cut off: {error}") from error


def _read_config(source: Path) -> Any:
    from peft import LoraConfig, PeftConfig

    try:
        lora = PeftConfig.from_pretrained(str(source))
    except (ValueError, KeyError, TypeError) as error:  # not JSON, no known peft_type, fields of other types
        raise ConfigError(f"{source / CONFIG_NAME} is not an adapter's configuration: {error!r}") from error
    if not isinstance(lora, LoraConfig):
        raise ConfigError(f"{source / CONFIG_NAME} is a {lora.peft_type} adapter; LoRA is needed")
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(lora, name, neutral)
        if value != neutral and value:
            raise ConfigError(f"{source / CONFIG_NAME} has {name} = {value!r}; only {neutral!r} is supported")
    if lora.init_lora_weights not in _PLAIN_STARTS:
        raise ConfigError(
            f"{source / CONFIG_NAME} has init_lora_weights = {lora.init_lora_weights!r}, which changes the base "
            "weight; convert the adapter to plain LoRA with PEFT first"
        )
    return lora


def _split(tensors: dict[str, Tensor], source: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return the factors by module name and every other tensor by its name in the plain model."""
    sides: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = _FACTOR.match(key)
        if match:
            sides.setdefault(match["module"], {})[match["side"]] = value
        else:
            # PEFT saves the whole weight of an adapted embedding or output layer, under its wrapper's `base_layer`.
            saved[key.removeprefix(_PREFIX).replace(".base_layer.", ".")] = value
    for name, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise ConfigError(f"{source / WEIGHTS_NAME} holds lora_{'/'.join(pair)} of {name!r} alone; both are needed")
    if not sides:
        raise ConfigError(f"{source / WEIGHTS_NAME} holds no LoRA factors")
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}, saved


def _check_factors_fit(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (lora_A, lora_B) in factors.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise TargetError(f"the adapter has factors for {name!r}, which is not in the model") from None
        if type(module) is not nn.Linear:
            raise TargetError(f"the adapter targets {name!r}, a {type(module).__name__}; only plain nn.Linear works")
        n, k = module.weight.shape
        if lora_A.dim() != 2 or tuple(lora_B.shape) != (n, lora_A.shape[0]) or lora_A.shape[1] != k:
            raise ShapeError(
                f"the adapter has A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)} for {name!r}; its weight "
                f"(N={n}, K={k}) needs (R, {k}) and ({n}, R)"
            )


def _check_others_fit(model: nn.Module, others: dict[str, Tensor]) -> None:
    state = model.state_dict()
    for key, value in others.items():
        if key not in state:
            raise TargetError(f"the adapter holds {key!r}, which is not in the model")
        if state[key].shape != value.shape:
            raise ShapeError(f"the adapter's {key!r} is {tuple(value.shape)}; the model's is {tuple(state[key].shape)}")


def _to_config(
    lora: Any, factors: dict[str, tuple[Tensor, Tensor]], whole: tuple[str, ...], task_type: str | None
) -> PLoRAConfig:
    ranks = {name: int(lora_A.shape[0]) for name, (lora_A, _) in factors.items()}
    return PLoRAConfig(
        rank=int(lora.r),
        alpha=float(lora.lora_alpha),
        rank_stabilized=bool(lora.use_rslora),
        dropout=float(lora.lora_dropout),
        target_modules=list(factors),
        modules_to_save=whole,
        task_type=task_type,
        rank_pattern={_exactly(name): rank for name, rank in ranks.items() if rank != lora.r},
        alpha_pattern=dict(lora.alpha_pattern),
    )
