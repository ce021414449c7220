"""A run's reference to the checkpoint that its base model was made of, by path, revision and digests of its files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fed.config import RunConfig
from fed.errors import FedError
from fed.files import digest_of

CHECKPOINT, DRAWN = "checkpoint.json", "drawn.safetensors"
# What transformers makes a model of; an adapter beside the weights would be put into it.
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_WEIGHTS = ("*.safetensors", "*.bin")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/?$")  # how a cache of the Hugging Face Hub names a revision
_AGAIN = "put back what was there, or start the run anew"


@dataclass(frozen=True)
class Reference:
    """The checkpoint of a base model: where it was, what its files held, and how the model holds it.

    `files` are digests by name. `revision` is the commit that a folder in the cache of the Hugging Face Hub is named
    by, else "". `dtype` is the dtype of the model's weights; `quantize` and `attention` are those of `[model]`.
    """

    path: str
    revision: str
    files: Mapping[str, str]
    dtype: str
    quantize: str
    attention: str

    def located(self, config: RunConfig | None, what: str) -> Path:
        """Return where the checkpoint is now, at `model.path` of a run's configuration or, without one, where it was.

        Raises FedError if it is not there, or a file of it is not as it was.
        """
        path = Path(self.path if config is None or config.model.path is None else config.model.path)
        if not path.is_dir():
            raise FedError(
                f"{what} refers to the checkpoint {str(path)!r}, which is gone; put it back, or set model.path in the "
                "run's config.toml to where it is now"
            )
        there = _files(path)
        for name, wanted in self.files.items():
            if name not in there:
                raise FedError(f"{what} refers to the checkpoint {str(path)!r}: {name} is missing there; {_AGAIN}")
            if digest_of(there[name]) != wanted:
                raise FedError(
                    f"{what} refers to the checkpoint {str(path)!r}: {name} changed since the run began; {_AGAIN}"
                )
        for name in sorted(there.keys() - self.files.keys()):
            raise FedError(
                f"{what} refers to the checkpoint {str(path)!r}: {name} was not there when the run began; remove that "
                "file, or start the run anew"
            )
        return path


def write(model: Any, config: RunConfig, directory: Path, drawn: Collection[str]) -> None:
    """Write a model's config.json and the reference to its checkpoint, and the weights `drawn`, if there are any."""
    path = Path(config.model.path or "")
    architecture = copy.deepcopy(model.config)
    architecture.architectures = [type(model).__name__]
    if config.model.quantize != "none":  # the checkpoint is not quantised
        del architecture.quantization_config
    directory.mkdir(parents=True, exist_ok=True)
    architecture.save_pretrained(directory)
    revision = _SNAPSHOT.search(path.absolute().as_posix())
    refers = Reference(
        path=str(path.absolute()),
        revision=revision[1] if revision else "",
        files={name: digest_of(file) for name, file in _files(path).items()},
        dtype=str(model.dtype).removeprefix("torch."),
        quantize=config.model.quantize,
        attention=config.model.attention,
    )
    (directory / CHECKPOINT).write_text(json.dumps(asdict(refers), indent=2) + "\n", encoding="utf-8")
    if drawn:
        own = model.state_dict()
        save_file({name: own[name].detach().cpu().contiguous() for name in sorted(drawn)}, directory / DRAWN)


def read(directory: Path, what: str) -> Reference | None:
    """Return the reference in a saved base, or None if that holds its model whole; raise FedError for a damaged one."""
    path = directory / CHECKPOINT
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = Reference(**facts)
        texts = (found.path, found.revision, found.dtype, found.quantize, found.attention, *found.files.values())
        known = isinstance(getattr(torch, found.dtype), torch.dtype) and found.quantize in ("none", "nf4", "int8")
        if known and all(isinstance(text, str) for text in texts):
            return found
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise FedError(f"{what} is damaged: {CHECKPOINT} is not what a run writes; start the run anew")


def name_of(directory: Path, config: RunConfig) -> str:
    """Return what an adapter names as its base: the checkpoint that a saved base refers to, or that base itself."""
    if (directory / CHECKPOINT).is_file() and config.model.path is not None:
        return str(Path(config.model.path).absolute())
    return str(directory)


def _files(path: Path) -> dict[str, Path]:
    """Return the files of a checkpoint that a model is made of, by name; of two formats of weights, the one loaded."""
    found = [path / name for name in _CONFIGS]
    for pattern in _WEIGHTS:
        if shards := sorted(path.glob(pattern)):
            found += [*shards, *sorted(path.glob(f"{pattern}.index.json"))]
            break
    return {file.name: file for file in found if file.is_file()}
