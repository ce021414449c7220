"""The files of a saved base model, held against the digests that were written beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from fed.errors import FedError
from fed.files import digest_of, sync_tree
from fed.sealed import read_sealed, write_sealed

DIGESTS = "digests.json"
RENEW = "start the run anew"
_ADAPTER = "adapter_config.json"  # transformers would put its adapter into the model
# The kinds of files that transformers reads from a folder; others, such as a note of the user's, change nothing.
_READ = {".json", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".py", ".jinja", ".txt", ".model"}


def write_digests(directory: Path) -> None:
    """Flush a folder's files to the disk, and then write their digests: a folder that has them is complete."""
    (directory / DIGESTS).unlink(missing_ok=True)
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    sync_tree(directory)
    write_sealed(directory / DIGESTS, {name: digest_of(directory / name) for name in names})


def check_files(directory: Path, what: str) -> None:
    """Raise FedError, beginning with `what`, unless the files are those that `write_digests` saw.

    A folder without digests, of an earlier version, is only checked to hold files where files belong.
    """
    if not directory.is_dir():
        raise FedError(f"{what} is missing; {RENEW}")
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.suffix in _READ}
    for name, path in sorted(found.items()):
        if not path.is_file():  # reading a named pipe would wait for ever
            raise FedError(f"{what} is damaged: {name} is not a file; {RENEW}")
    if DIGESTS not in found:
        if _ADAPTER in found:
            raise FedError(f"{what} holds {_ADAPTER}, which was not saved with it; remove that file, or {RENEW}")
        return
    try:
        files = read_sealed(directory / DIGESTS)
    except FedError:
        raise FedError(f"{what} is damaged: {DIGESTS} is not as it was saved; {RENEW}") from None
    for name, wanted in files.items():
        if not (directory / name).is_file():
            raise FedError(f"{what} is damaged: {name} is missing; {RENEW}")
        if digest_of(directory / name) != wanted:
            raise FedError(f"{what} is damaged: {name} is not as it was saved; {RENEW}")
    for name in sorted(found.keys() - files.keys() - {DIGESTS}):
        raise FedError(f"{what} holds {name}, which was not saved with it; remove that file, or {RENEW}")


def check_sizes(outline: nn.Module, directory: Path, what: str) -> None:
    """Raise FedError, naming a weight, if one has another shape in its file than in a model of the saved kind."""
    own = outline.state_dict()
    for name, weight in weights(directory, what):
        if name in own and own[name].shape != weight.shape:
            saved, wanted = tuple(weight.shape), tuple(own[name].shape)
            raise FedError(f"{what} is damaged: {name!r} is {saved}, not {wanted}; {RENEW}")


def check_dtypes(model: nn.Module, directory: Path, what: str) -> None:
    """Raise FedError, naming a weight, if one has another dtype in its file than in the model: it was converted."""
    own = model.state_dict()
    for name, weight in weights(directory, what):
        if name in own and own[name].dtype != weight.dtype:
            raise FedError(f"{what} is damaged: {name!r} is {weight.dtype}, not {own[name].dtype}; {RENEW}")


def weights(directory: Path, what: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder's files by name; their values are read from the disk only if they are looked at."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise FedError(f"{what} is damaged: {path.name}: {error}; {RENEW}") from error
