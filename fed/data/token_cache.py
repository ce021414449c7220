"""A cache of tensors in files, each named by a hash of everything that its tensors depend on."""

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

_KEY, _CONTENT = "key", "content"  # names in a file's metadata


def user_directory() -> Path:
    """Return `$PLORA_KERNELS_CACHE`, or else the folder plora_kernels in `$XDG_CACHE_HOME` or in ~/.cache."""
    named = os.environ.get("PLORA_KERNELS_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "plora_kernels"


def cached(
    directory: Path | None,
    key: Mapping[str, Any],
    make: Callable[[], dict[str, Tensor]],
    on_event: Callable[[str], object],
) -> dict[str, Tensor]:
    """Return the result of `make`, read from a file in `directory` if one exists for this key, else computed and saved.

    The file is named by a hash of the key, and contains the key and a hash of its tensors. A file that is damaged or
    holds another key is replaced. `on_event` receives a message about that, or if the file cannot be written. Without a
    directory nothing is saved.
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
    """Write to a temporary directory and rename, because two processes may write the same file at once."""
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
