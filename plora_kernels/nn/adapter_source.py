"""Where an adapter's files are: in a folder, or in a repository of the Hugging Face hub, brought into its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from plora_kernels.errors import ConfigError
from plora_kernels.nn.adapter_config import first_line, shown
from plora_kernels.nn.adapter_files import CONFIG_NAME, PICKLED_NAME, WEIGHTS_NAME, check_directory

_HUB_ID = re.compile(r"\b[\w.-]+\b/\b[\w.-]+\b")  # of an owner and a name, as the hub allows them


def find_adapter(directory: str | os.PathLike[str], subfolder: str | os.PathLike[str] | None, **hub: Any) -> Path:
    """Return the folder with an adapter's two files; those of a repository on the hub are brought into the cache.

    What names a file or folder here is that. Only a text such as "user/adapter" that names none is asked of the hub.

    Args:
        directory: a folder, or a repository's id. subfolder: where in it the files are.
        hub: further arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        ConfigError: there is no such folder or repository, or no adapter in it.
    """
    if subfolder is not None and not isinstance(subfolder, str | os.PathLike):
        raise ConfigError(f"subfolder is {shown(subfolder)}; a path inside the folder or repository is needed")
    inside = "" if subfolder is None else os.fspath(subfolder)
    if isinstance(directory, str) and _HUB_ID.fullmatch(directory) and not os.path.lexists(directory):
        return _from_hub(directory, inside, hub)
    return check_directory(directory, inside)


def _from_hub(repository: str, inside: str, hub: dict[str, Any]) -> Path:
    """Return the folder in the hub's cache that has the configuration and the tensors of one commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    where = f"{inside}/" if inside else ""
    revision = f" at revision {hub['revision']!r}" if hub.get("revision") is not None else ""
    missing = f"{repository!r} is no folder here, nor an adapter on the hub or in its cache{revision}"

    def fetch(name: str, **changed: Any) -> Path:
        try:
            return Path(hf_hub_download(repository, where + name, **{**hub, **changed}))
        except EntryNotFoundError:
            raise
        except Exception as error:  # no such repository or revision, no access, no connection: each has its own
            raise ConfigError(f"{missing}: {first_line(error)}") from error

    try:
        config = fetch(CONFIG_NAME)
    except EntryNotFoundError as error:
        raise ConfigError(f"{missing}; {where + CONFIG_NAME} cannot be had: {_reason(error)}") from error
    folder = config.parent
    # The tensors are of the commit that the configuration is of, even if the branch has moved on since.
    commit = folder.parents[len(PurePosixPath(where).parts) - 1].name if where else folder.name
    for name in (WEIGHTS_NAME, PICKLED_NAME):
        try:
            fetch(name, revision=commit)
            return folder
        except EntryNotFoundError as error:
            reason = _reason(error)
    raise ConfigError(
        f"{repository!r} has {where + CONFIG_NAME}{revision}, but neither {WEIGHTS_NAME} nor {PICKLED_NAME} beside it "
        f"can be had: {reason}"
    )


def _reason(error: BaseException) -> str:
    """Return why a file cannot be had: what the hub's client met first, such as that it is offline."""
    return first_line(error.__cause__ or error)
