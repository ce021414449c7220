"""The base model in a run's directory: saved whole, or as a reference to its checkpoint with what the run drew."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fed.config import RunConfig
from fed.data.labels import quoted
from fed.data.pretrained import failing_as, load_architecture, load_tokenizer, quiet, tokenizer_in
from fed.errors import FedError
from fed.models import reference
from fed.models.checkpoint import Form, Loaded, load_weights, pad_as
from fed.models.devices import find_device
from fed.models.head import head_parameters, hold_in_float32
from fed.models.reference import DRAWN, Reference
from fed.models.saved_files import RENEW, check_dtypes, check_files, check_sizes, weights, write_digests


def save(model: Any, config: RunConfig, directory: Path, drawn: Collection[str]) -> None:
    """Save a base model, with the tokenizer of its checkpoint if it came from one.

    The embedded ViT, and with `model.copy_base` any model, is saved whole in transformers' format. Otherwise the
    folder holds the model's config.json, a reference to its checkpoint (`fed.models.reference`), and the weights
    `drawn`, by their names in the model, which the run made itself. The digests of all files come last, once these are
    on the disk; `reopen` holds the files against them.
    """
    with quiet():
        if config.model.path is not None:
            load_tokenizer(config).save_pretrained(directory)
        if config.model.path is None or config.model.copy_base:
            model.save_pretrained(directory)
        else:
            reference.write(model, config, directory, drawn)
    write_digests(directory)


def reopen(directory: Path, label_names: tuple[str, ...] = (), config: RunConfig | None = None) -> nn.Module:
    """Load a base model that `save` wrote, bit for bit, in the saved form.

    A checkpoint that it refers to is looked for at `model.path` of `config`, or without one where it was. A model of a
    checkpoint is loaded to the device of `config`; without one, and for the embedded ViT, that is the CPU. Raises
    FedError if a file or a weight, of the checkpoint too, is not as it was saved, or if the model's labels are not
    `label_names`, in this order; () allows any. No code in a folder is run.
    """
    what = f"the base model in {str(directory)!r}"
    check_files(directory, what)
    with quiet(), failing_as(f"{what} does not load"):
        architecture = load_architecture(directory)
        kind = _class_of(architecture)
    refers = reference.read(directory, what)
    if refers is None:
        model = _whole(directory, architecture, kind, what, config)
    else:
        model = _referred(refers, directory, architecture, kind, what, config)
    saved = tuple((architecture.id2label or {}).values())
    if label_names and saved != label_names:
        raise FedError(
            f"{what} has the labels {quoted(saved)}, and the data {quoted(label_names)}; "
            "model.path and data.path should be as they were when it was made"
        )
    return model


def _device_of(config: RunConfig | None) -> torch.device:
    return torch.device("cpu") if config is None or config.model.path is None else find_device(config.device)


def _whole(directory: Path, architecture: Any, kind: Any, what: str, config: RunConfig | None) -> nn.Module:
    """Return a model that was saved whole."""
    with quiet(), failing_as(f"{what} does not load"), torch.device("meta"):  # a model without memory for its weights
        outline = kind(architecture)
    check_sizes(outline, directory, what)
    form = Form("auto", "none", "auto" if config is None else config.model.attention, _device_of(config))
    with quiet():
        loaded = load_weights(kind, directory, architecture, form, f"{what} does not load", use_safetensors=True)
    _check_complete(loaded, what)
    hold_in_float32(loaded.model)
    _restore(loaded.model, directory, head_parameters(loaded.model), what)
    check_dtypes(loaded.model, directory, what)
    return loaded.model


def _referred(
    refers: Reference, directory: Path, architecture: Any, kind: Any, what: str, config: RunConfig | None
) -> nn.Module:
    """Return a model of a checkpoint and of the weights that the run drew itself."""
    path = refers.located(config, what)
    form = Form(refers.dtype, refers.quantize, refers.attention, _device_of(config))
    with quiet():
        sizes = {"ignore_mismatched_sizes": True, "config": architecture}
        loaded = load_weights(kind, path, architecture, form, f"{what} does not load", **sizes)
        pad_as(loaded.model, tokenizer_in(directory))
    drawn = {name for name, _ in weights(directory, what)}
    if lacking := sorted((loaded.missing | loaded.resized.keys()) - drawn):
        raise FedError(f"{what} is damaged: neither {DRAWN} nor the checkpoint has {lacking[0]!r}; {RENEW}")
    hold_in_float32(loaded.model)
    _restore(loaded.model, directory, drawn, what)
    return loaded.model


def _restore(model: nn.Module, directory: Path, names: Collection[str], what: str) -> None:
    """Copy weights from a folder's files into the model as they were saved, in float32 where loading rounds them."""
    own = dict(model.named_parameters())
    for name, value in weights(directory, what):
        if name not in names or name not in own:
            continue
        if own[name].shape != value.shape or not value.is_floating_point():
            raise FedError(f"{what} is damaged: {name!r} is {value.dtype} {tuple(value.shape)}; {RENEW}")
        with torch.no_grad():
            own[name].copy_(value)


def _class_of(architecture: Any) -> Any:
    """Return the class of transformers' models that a configuration names, which takes this configuration."""
    import transformers

    names = architecture.architectures
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    wanted: Any = kind.config_class if is_model else None  # None for PreTrainedModel itself
    if wanted is not None and isinstance(architecture, wanted):
        return kind
    raise FedError(
        f"its config.json has architectures {names!r}; one class of transformers for its model_type is needed"
    )


def _check_complete(loaded: Loaded, what: str) -> None:
    """Raise FedError, naming a weight, if those in the file are not exactly the model's."""
    for name in sorted(loaded.missing):
        raise FedError(f"{what} is damaged: its file has no {name!r}; {RENEW}")
    for name in sorted(loaded.unexpected):
        raise FedError(f"{what} is damaged: its file has {name!r}, which is not in the model; {RENEW}")
