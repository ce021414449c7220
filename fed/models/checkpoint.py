"""Loading a checkpoint's weights: in which dtype, quantised or not, and straight to the run's device."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fed.config import RunConfig
from fed.data.pretrained import failing_as, position_padding
from fed.errors import FedError
from fed.models.devices import find_device, require_dtype
from fed.models.head import head_names

_LIBRARIES = ("bitsandbytes", "torchao")  # those of the extra `quantized`, as transformers names them too


@dataclass(frozen=True)
class Form:
    """How a checkpoint is held: dtype, quantisation and attention as `fed.config.ModelConfig` has them, and device."""

    dtype: str
    quantize: str
    attention: str
    device: torch.device

    @classmethod
    def of(cls, config: RunConfig) -> Form:
        """Return the form that a run's configuration asks for."""
        model = config.model
        return cls(model.dtype, model.quantize, model.attention, find_device(config.device))


@dataclass(frozen=True)
class Loaded:
    """A model with a checkpoint's weights.

    missing: names of weights that the checkpoint lacks.  resized: those it has in another size, with what is wrong.
    Both were drawn from torch's generators.  unexpected: names in the checkpoint that are not in the model.
    """

    model: Any
    missing: set[str]
    resized: Mapping[str, str]
    unexpected: set[str]


def load_weights(kind: Any, path: Path, architecture: Any, form: Form, what: str, **settings: Any) -> Loaded:
    """Load a checkpoint as a model of transformers' class `kind`, on the device of `form`.

    On the CPU weights that need no conversion are mapped from their file; to any other device they go one at a time.
    Linear layers whose weights the checkpoint lacks are not quantised: there is nothing to quantise until they are
    drawn. Raises FedError if the device does not compute in the dtype, if a library or kind of attention is not there,
    and, beginning with `what`, if the checkpoint does not load.
    """
    options = {**_options(kind, path, architecture, form), **settings}
    attention = "" if form.attention == "auto" else f" with model.attention = {form.attention!r}"

    def load() -> tuple[Any, dict[str, Any]]:
        with failing_as(f"{what}{attention}"):
            found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
            )
        return found

    model, report = load()
    if form.quantize != "none" and (lacking := _quantised_among(model, report["missing_keys"])):
        options["quantization_config"].llm_int8_skip_modules += lacking
        model, report = load()
    _keep_values(model)
    resized = {name: f"is {tuple(saved)}, not {tuple(wanted)}" for name, saved, wanted in report["mismatched_keys"]}
    return Loaded(model, set(report["missing_keys"]), resized, set(report["unexpected_keys"]))


def _options(kind: Any, path: Path, architecture: Any, form: Form) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that give a model the form; raise FedError if it cannot have it."""
    own = getattr(architecture, "quantization_config", None)
    if own is not None and form.quantize != "none":
        raise FedError(f"model.quantize is {form.quantize!r}: the checkpoint is quantised already; 'none' takes it so")
    if own is not None:
        _require_library(_method_of(own), f"model.path is {str(path)!r}, a quantised checkpoint")
    dtype = saved_dtype(path, architecture, form)
    require_dtype(dtype, form.device, f"model.dtype is {form.dtype!r}")
    options: dict[str, Any] = {"dtype": dtype}
    if form.attention != "auto":
        _require_attention(form.attention)
        options["attn_implementation"] = form.attention
    if form.device.type != "cpu":
        options["device_map"] = {"": form.device}
    if form.quantize != "none":
        _require_library("bitsandbytes", f"model.quantize is {form.quantize!r}")
        options["quantization_config"] = _quantization(kind, architecture, form, dtype)
    return options


def _quantised_among(model: nn.Module, weights: Collection[str]) -> list[str]:
    """Return the names of the modules that hold these weights quantised."""
    names = sorted({name.rpartition(".")[0] for name in weights if name.endswith(".weight")})
    return [name for name in names if type(model.get_submodule(name)).__module__.startswith("bitsandbytes.")]


def _keep_values(model: nn.Module) -> None:
    """Keep layers in 4 bits from being repacked by a forward on a CPU, which rounds the scales of their weights.

    The base would no longer be the one that was loaded, nor the one that a resumed run loads.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def pad_as(model: Any, tokenizer: Any) -> None:
    """Make the tokenizer's padding token the model's, for decoders take the last token that is no padding.

    A model that numbers positions from its padding token on keeps its own, or the positions would be others once it is
    saved and loaded; it needs the attention mask alone.
    """
    if position_padding(model) is not None:
        return
    for settings in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if settings is not None:
            settings.pad_token_id = tokenizer.pad_token_id


def saved_dtype(path: Path, architecture: Any, form: Form) -> torch.dtype:
    """Return the dtype to load weights in: that of the form, or the one the checkpoint names, or its first weight's."""
    if form.dtype != "auto":
        return getattr(torch, form.dtype)
    named = getattr(architecture, "dtype", None) or getattr(architecture.get_text_config(), "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    with failing_as(f"model.path is {str(path)!r}: the checkpoint does not load"):
        return next(_dtypes(path), torch.float32)


def _dtypes(path: Path) -> Iterator[torch.dtype]:
    """Yield the dtypes of the floating-point weights in a checkpoint's files, those of safetensors first."""
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                if (dtype := opened.get_tensor(name).dtype).is_floating_point:
                    yield dtype
    for file in sorted(path.glob("pytorch_model*.bin")):
        for value in torch.load(file, map_location="meta", weights_only=True).values():
            if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
                yield value.dtype


def _require_attention(name: str) -> None:
    """Raise FedError, naming what there is, if transformers knows no attention of this name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {"eager", *ALL_ATTENTION_FUNCTIONS}
    plain = sorted(each for each in known if each.isidentifier())
    if name not in plain:
        raise FedError(f"model.attention is {name!r}; 'auto' or one of {', '.join(plain)} would be right")


def _require_library(name: str, what: str) -> None:
    """Raise FedError, naming the extra that brings it, if a library of quantisation is not installed."""
    if name in _LIBRARIES and find_spec(name) is None:
        raise FedError(
            f"{what}: that needs the library {name}, which is not installed; pip install plora-kernels[quantized] "
            "brings it"
        )


def _method_of(quantization: Any) -> str:
    """Return the name of the library in a checkpoint's `quantization_config`, which is a table or an object."""
    table = quantization if isinstance(quantization, dict) else vars(quantization)
    method = table.get("quant_method")
    return str(getattr(method, "value", method))


def _quantization(kind: Any, architecture: Any, form: Form, dtype: torch.dtype) -> Any:
    """Return transformers' settings for holding all linear layers but the head and the output embeddings quantised."""
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):  # a model without memory for its weights
        outline = _outline(kind, architecture)
    left = _left_alone(outline)
    if form.quantize == "int8":
        # Its products are in float16 whatever the model's dtype, which the library would say at each of them.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left,
    )


def _left_alone(outline: nn.Module) -> list[str]:
    """Return the names of the modules that are never quantised."""
    output = getattr(outline, "get_output_embeddings", lambda: None)()
    embeddings = [name for name, module in outline.named_modules() if module is output and output is not None]
    return [*head_names(outline), *embeddings]


def _outline(kind: Any, architecture: Any) -> nn.Module:
    """Return a model of a class, or of the one that an automatic class chooses."""
    automatic = hasattr(kind, "from_config")
    outline: nn.Module = kind.from_config(architecture, trust_remote_code=False) if automatic else kind(architecture)
    return outline
