"""Reading text as UTF-8; writing files that are never seen incomplete and outlast a power loss; digests of files.

A file is written under a temporary name, flushed to the disk and renamed. Without the flush a file system may keep the
rename over a power loss and lose the content.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from fed.errors import FedError, system_fault

_SYNCED_AT_ONCE = 8  # file systems write what is flushed at the same time in one go

# The marks at the beginning of texts that are not UTF-8; the four bytes of UTF-32 begin with the two of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path) -> str:
    r"""Return the content of a UTF-8 text file, without a byte order mark, its line ends as "\n".

    Raises OSError, or ValueError in one line if the file is not UTF-8 text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    ...     read_text(Path(folder, "a.txt"))
    'one\ntwo'
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(why_not_utf8(path)) from None
    if "\0" in text:
        raise ValueError(why_not_utf8(path))
    return text


def why_not_utf8(path: Path) -> str:
    """Return why a file is not UTF-8 text, as a clause: the mark of another encoding, or a byte and its line."""
    content = path.read_bytes()
    for mark, name in _OTHER_MARKS.items():
        if content.startswith(mark):
            return f"it is {name}; save it as UTF-8"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return f"byte 0x{content[error.start]:02x} in line {line} is not UTF-8"
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        return f"line {line} holds a NUL byte, as UTF-16 text does; save it as UTF-8"
    return "it changed while it was read"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; at the end the file there replaces `path`, also on the disk.

    If the body raises, `path` stays as it was and the temporary file is deleted.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "a.txt")) as temporary:
    ...         _ = temporary.write_text("whole")
    ...     Path(folder, "a.txt").read_text()
    'whole'
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path):
            yield temporary
            sync([temporary])
            temporary.replace(path)
            sync([path.parent])
    except BaseException:
        with suppress(OSError):  # of a disk that has failed already
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system within the context name `path`: that of a full disk names no file or a temporary one.

    >>> with naming(Path("runs/a/adapter")):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'runs/a/adapter'
    """
    try:
        yield
    except Exception as error:
        named = getattr(error, "filename", None) not in (None, f"{path}.tmp")
        if named or isinstance(error, FedError) or (fault := system_fault(error)) is None:
            raise
        raise OSError(getattr(error, "errno", None) or errno.EIO, fault, str(path)) from error


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file atomically, text as UTF-8, and return its path; if writing fails the old file stays as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder, "rows.txt"), "a\\n").read_bytes()
    b'a\\n'
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, and flush their names to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    sync([folder.parent for folder in reversed(missing)])


def sync(paths: Iterable[Path]) -> None:
    """Flush files and folders to the disk; for a folder that is the names in it, not the content of its files."""
    found = list(paths)
    if len(found) < 2:  # without a thread
        for path in found:
            _sync(path)
        return
    with ThreadPoolExecutor(min(_SYNCED_AT_ONCE, len(found))) as pool:
        list(pool.map(_sync, found))


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    sync([folder, *(path for path in folder.rglob("*") if not path.is_symlink())])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(content: bytes) -> str:
    """Return the BLAKE2b digest of some bytes, 32 hexadecimal digits.

    >>> digest(b"rows")
    'f2305e3ea413d261c40604673f9fbe7d'
    """
    return new_digest(content).hexdigest()


def digest_of(path: Path) -> str:
    """Return the `digest` of a file's content, without holding the whole file in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def new_digest(content: bytes = b"") -> hashlib.blake2b:
    """Return the state of a `digest`, to which further bytes can be added."""
    return hashlib.blake2b(content, digest_size=16)
