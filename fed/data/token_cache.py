"""Tensors kept in files, each under a name made of all they depend on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_KEY, _CONTENT = "key", "content"  # of a file's metadata


def user_directory() -> Path:
    """Return `$PLORA_KERNELS_CACHE`, or plora_kernels in `$XDG_CACHE_HOME`, or in ~/.cache."""
    named = os.environ.get("PLORA_KERNELS_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "plora_kernels"


def cached(
    directory: Path | None,
    key: Mapping[str, Any],
    make: Callable[[], dict[str, Tensor]],
    on_event: Callable[[str], object],
) -> dict[str, Tensor]:
    """Return what `make` returns, from the file in `directory` if there is one for this very key.

    The file's name is a hash of the key, which it also holds, with a hash of its tensors. One that is damaged or
    holds another key is made anew; `on_event` gets a line on that, and where the file cannot be written. None for a
    directory keeps nothing.
    """
    if directory is None:
        return make()
    text = json.dumps(key, sort_keys=True)
    path = directory / f"{blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
    if path.exists():
        try:
            return _read(path, text)
        except (OSError, SafetensorError, ValueError) as error:
            on_event(f"{path} is damaged and is made anew: {str(error).splitlines()[0]}")
    tensors = make()
    try:
        _write(path, tensors, {_KEY: text, _CONTENT: _digest(tensors)})
    except OSError as error:
        on_event(f"tokens are not kept: {path} cannot be written: {error.strerror}")
    return tensors


def _read(path: Path, key: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    if metadata.get(_KEY) != key:
        raise ValueError("it belongs to other settings")
    if metadata.get(_CONTENT) != _digest(tensors):
        raise ValueError("its contents have changed")
    return tensors


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write under a temporary name of its own, then rename: two processes may write the same file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".tmp") as directory:
        temporary = Path(directory) / path.name
        save_file(tensors, temporary, metadata)
        temporary.replace(path)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
